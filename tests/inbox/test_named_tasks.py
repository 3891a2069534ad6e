"""Tasks that are made reliable by their names, and calls that are no deliveries."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from celery import Task, shared_task
from celery.exceptions import Reject
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from celery_eda.app.installation import make_reliable
from celery_eda.errors import NoDelivery
from celery_eda.inbox.task import ReliableTask
from tests.support.databases import Database
from tests.support.worker_slot import Slot


class Polite(Task):
    """A base class of somebody's own."""

    greeting = "hello"

    def before_start(self, *_: Any) -> None:
        self.app.greeted.append(self.greeting)


def test_tasks_named_by_a_pattern_are_reliable_however_they_were_made(
    shared_database: Database, slot: Slot
) -> None:
    named = Slot(shared_database, eda_tasks=["named.*"])
    named.app.greeted = []

    @named.app.task(shared=False, name="named.plain")
    def plain(number: int) -> None:
        named.write(number)

    @shared_task(name="named.shared", bind=True)
    def shared(self: Task, number: int) -> None:
        assert self.name == "named.shared"
        named.write(number)

    @named.app.task(shared=False, name="named.based", base=Polite, bind=True, max_retries=1)
    def based(self: Polite, number: int) -> None:
        assert self.greeting == "hello"
        named.write(number + self.request.retries)
        raise self.retry(countdown=0)

    @named.app.task(shared=False, name="named.async", autoretry_for=(LookupError,))
    async def asynchronous(number: int) -> None:
        await asyncio.sleep(0)
        named.write(number)
        if asynchronous.request.retries == 0:
            raise LookupError

    @named.app.task(shared=False, name="other")
    def other() -> None:
        """Stays plain."""

    named.app.finalize()

    @named.app.task(shared=False, name="named.late")
    def late(number: int) -> None:
        named.write(number)

    make_reliable(named.app)
    for number, name in enumerate(("plain", "shared", "based", "async", "late")):
        named.app.send_task(f"named.{name}", (10 * number,))
    messages = named.sent()
    for message in messages:
        named.deliver(message)
        named.deliver(message)
    named.work()

    assert len(messages) == 5
    assert named.effects() == [0, 10, 30, 40]
    assert named.app.greeted == ["hello"] * 2  # not for copies
    assert [each.task for each in named.dead()] == ["named.based"]
    assert not isinstance(named.app.tasks["other"], ReliableTask)
    assert all(named.app.tasks[each.task].acks_late for each in messages)


def test_a_reliable_task_may_have_a_base_class_of_its_own(slot: Slot) -> None:
    slot.app.greeted = []

    @slot.task(base=Polite, bind=True)
    def based(self: Polite, session: Session, number: int) -> str:
        slot.write(number)
        return self.greeting

    based.delay(7)
    (message,) = slot.sent()
    slot.deliver(message)

    assert slot.result(message).result == "hello"
    assert slot.effects() == [7]


def test_what_goes_wrong_before_the_handler_starts_is_a_dead_letter(slot: Slot) -> None:
    class Impolite(Task):
        def before_start(self, *_: Any) -> None:
            raise LookupError("no")

    @slot.task(base=Impolite)
    def based(number: int) -> None:
        slot.write(number)

    based.delay(7)
    slot.work()

    assert [each.error_type for each in slot.dead()] == ["LookupError"]


def test_a_task_called_as_a_function_is_part_of_the_handler(slot: Slot) -> None:
    @slot.task
    def other(session: Session, number: int) -> int:
        slot.write(number)
        return number

    @slot.task
    def itself(session: Session, number: int) -> int:
        slot.write(number)
        return number + (itself(number - 1) if number else other(100))

    itself.delay(2)
    (message,) = slot.sent()
    slot.deliver(message)

    assert slot.result(message).result == 103
    assert slot.effects() == [0, 1, 2, 100]
    assert slot.outcomes() == [(0, "done")]


def test_outside_a_delivery_there_is_no_session(slot: Slot) -> None:
    @slot.task
    def with_session(session: Session) -> None:
        """Never runs."""

    with pytest.raises(NoDelivery, match=r"eda\.transaction"):
        _ = slot.eda.session
    with pytest.raises(NoDelivery):
        with_session()


def test_an_eager_task_runs_at_once_as_a_plain_function(slot: Slot) -> None:
    slot.app.conf.task_always_eager = True
    ran = []

    @slot.task
    def plain(number: int) -> int:
        ran.append(number)
        return number

    @slot.task
    def with_session(session: Session) -> None:
        """Never runs."""

    assert plain.delay(7).get() == 7
    assert isinstance(with_session.delay().result, NoDelivery)
    assert ran == [7]
    assert slot.waiting() == []


def test_an_outage_in_the_handler_is_waited_for_and_then_left_to_the_broker(slot: Slot) -> None:
    @slot.task(bind=True, autoretry_for=(Exception,), max_retries=0)
    def unlucky(self: Task, session: Session, number: int) -> None:
        slot.write(number)
        error = OperationalError("SELECT 1", {}, Exception("gone"), connection_invalidated=True)
        raise error

    unlucky.delay(7)
    (message,) = slot.sent()
    ending = slot.deliver(message)

    assert isinstance(ending, Reject)
    assert ending.requeue
    assert slot.dead() == []
    assert slot.outcomes() == []
