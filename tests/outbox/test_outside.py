"""Messages that leave whatever becomes of the session around them: Celery's own, and on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from celery import chain, chord, signals
from sqlalchemy import insert, select, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_eda.errors import OutsideTransaction
from celery_eda.outbox import result_backend
from tests.faults.programs.tables import effects
from tests.support.worker_slot import Slot


class Mishap(Exception):
    """An error of the user's code."""


@pytest.fixture
def sessions(slot: Slot) -> sessionmaker[Session]:
    """An attached sessionmaker on the service's database."""
    factory = sessionmaker(slot.engine)
    slot.eda.attach(factory)
    return factory


@pytest.fixture
def scoped(slot: Slot) -> Iterator[scoped_session[Session]]:
    """An attached scoped_session, which is removed after each task, as web frameworks do."""
    registry = scoped_session(sessionmaker(slot.engine))
    slot.eda.attach(registry)

    def remove(**_: Any) -> None:
        registry.remove()

    signals.task_postrun.connect(remove)
    yield registry
    signals.task_postrun.disconnect(remove)
    registry.remove()


def arrived(slot: Slot) -> list[str]:
    """The tasks of the messages that the broker has got, which are taken from it."""
    tasks = []
    with slot.app.connection_for_read() as connection:
        queue = slot.app.amqp.queues[slot.app.conf.task_default_queue]
        bound = queue(connection.default_channel)
        bound.declare()
        while message := bound.get(no_ack=True):
            tasks.append(message.headers["task"])
    return tasks


def run(slot: Slot, signature: Any) -> None:
    """Run the first task of *signature* as a worker would; what it publishes goes to the broker."""
    with slot.eda.transaction():
        signature.apply_async()
    for message in slot.sent():
        result_backend.run_prerequisites(slot.app, message.prerequisites, message.identity)
        slot.deliver(message)


def write(session: Any, number: int = 1) -> None:
    session.execute(insert(effects).values(name="effect", number=number))


WORK: list[Callable[[Any], Any]] = [lambda session: session.execute(text("select 1")), write]


@pytest.mark.parametrize("work", WORK, ids=["read", "wrote"])
def test_a_plain_task_is_retried_though_its_attached_session_is_rolled_back(
    slot: Slot, sessions: sessionmaker[Session], work: Callable[[Any], Any]
) -> None:
    @slot.app.task(shared=False, bind=True, name="unsure")
    def unsure(self: Any) -> None:
        with sessions() as session:
            work(session)
            raise self.retry(exc=Mishap(), countdown=0)

    run(slot, unsure.s())

    assert (arrived(slot), slot.effects()) == (["unsure"], [])


def test_a_plain_task_is_retried_though_its_transaction_is_rolled_back(slot: Slot) -> None:
    @slot.app.task(shared=False, bind=True, name="unsure")
    def unsure(self: Any) -> None:
        with slot.eda.transaction() as session:
            write(session)
            raise self.retry(exc=Mishap(), countdown=0)

    run(slot, unsure.s())

    assert (arrived(slot), slot.effects()) == (["unsure"], [])


def test_autoretry_sends_the_next_attempt_while_a_scoped_session_is_open(
    slot: Slot, scoped: scoped_session[Session]
) -> None:
    @slot.app.task(
        shared=False, autoretry_for=(Mishap,), retry_kwargs={"countdown": 0}, name="unsure"
    )
    def unsure() -> None:
        write(scoped)
        raise Mishap

    run(slot, unsure.s())

    assert (arrived(slot), slot.effects()) == (["unsure"], [])


def test_an_errback_leaves_although_the_failure_rolls_the_session_back(
    slot: Slot, scoped: scoped_session[Session]
) -> None:
    @slot.app.task(shared=False, name="fails")
    def fails() -> None:
        write(scoped)
        raise Mishap

    @slot.app.task(shared=False, name="mourn")
    def mourn() -> None:
        pass

    run(slot, fails.s().on_error(mourn.si()))

    assert arrived(slot) == ["mourn"]


def test_an_errback_that_is_called_publishes_by_the_rules_of_its_session(
    slot: Slot, scoped: scoped_session[Session]
) -> None:
    @slot.app.task(shared=False, name="fails")
    def fails() -> None:
        scoped.rollback()
        raise Mishap

    @slot.app.task(shared=False, name="after")
    def after() -> None:
        pass

    @slot.app.task(shared=False, name="mourn")
    def mourn(request: Any, error: Any, traceback: Any) -> None:
        write(scoped)
        after.delay()
        scoped.rollback()

    run(slot, fails.s().on_error(mourn.s()))

    assert arrived(slot) == []


def test_links_and_the_next_of_a_chain_leave_although_a_session_was_left_open(
    slot: Slot, scoped: scoped_session[Session]
) -> None:
    @slot.app.task(shared=False, name="forgetful")
    def forgetful() -> None:
        write(scoped)

    @slot.app.task(shared=False, name="after")
    def after(*_: Any) -> None:
        pass

    first = forgetful.s()
    first.link(after.si())
    run(slot, chain(first, after.si()))

    assert arrived(slot) == ["after", "after"]


def test_the_body_of_a_chord_leaves_although_a_session_was_left_open(
    slot: Slot, scoped: scoped_session[Session]
) -> None:
    @slot.app.task(shared=False, name="part")
    def part() -> None:
        write(scoped)

    @slot.app.task(shared=False, name="body")
    def body(*_: Any) -> None:
        pass

    run(slot, chord([part.s(), part.s()], body.s()))

    assert "body" in [*arrived(slot), *slot.waiting()]


@pytest.mark.parametrize("kind", ["task", "chain", "group"])
@pytest.mark.parametrize("reliable", [True, False], ids=["reliable", "plain"])
def test_a_task_is_replaced_though_its_attached_session_is_rolled_back(
    slot: Slot, sessions: sessionmaker[Session], reliable: bool, kind: str
) -> None:
    make = slot.task if reliable else partial(slot.app.task, shared=False)

    @slot.app.task(shared=False, name="successor")
    def successor(*_: Any) -> None:
        pass

    @make(bind=True, name="replaced")
    def replaced(self: Any) -> Any:
        successors = {
            "task": successor.si(),
            "chain": chain(successor.si(), successor.si()),
            "group": successor.si() | chain(successor.si(), successor.si()),
        }
        with sessions() as session:
            session.scalars(select(effects)).all()
            raise self.replace(successors[kind])

    run(slot, replaced.s())

    assert [*arrived(slot), *slot.waiting()] == ["successor"]


# ── on purpose ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def alert(slot: Slot) -> Any:
    """A reliable task, whose messages are stored."""

    @slot.task
    def alert(what: str) -> None:
        pass

    return alert


def test_a_message_published_outside_on_purpose_leaves_though_the_transaction_fails(
    slot: Slot, alert: Any
) -> None:
    with suppress(Mishap), slot.eda.transaction():
        with slot.eda.outside():
            alert.delay("failed")
        alert.delay("done")
        raise Mishap

    assert slot.waiting() == ["alert"]


def test_a_message_published_outside_on_purpose_leaves_though_the_handler_fails(
    slot: Slot, alert: Any
) -> None:
    @slot.task
    def fails() -> None:
        with slot.eda.outside():
            alert.delay("failed")
        alert.delay("done")
        raise Mishap

    run(slot, fails.s())

    assert slot.waiting() == ["alert"]


def test_a_transaction_that_is_opened_outside_on_purpose_captures(slot: Slot, alert: Any) -> None:
    with suppress(Mishap), slot.eda.transaction():
        with slot.eda.outside(), suppress(Mishap), slot.eda.transaction():
            alert.delay("a")
            raise Mishap
        with slot.eda.outside(), slot.eda.transaction():
            alert.delay("b")
        raise Mishap

    assert slot.waiting() == ["alert"]


def test_after_a_rollback_a_message_belongs_to_no_transaction(
    slot: Slot, sessions: sessionmaker[Session], alert: Any
) -> None:
    with suppress(Mishap), sessions() as session:
        try:
            write(session)
            raise Mishap
        except Mishap:
            session.rollback()
            alert.delay("failed")
            raise

    assert slot.waiting() == ["alert"]


# ── eda_outside = "raise" ───────────────────────────────────────────────────────────────────


@pytest.fixture
def strict(slot: Slot) -> Slot:
    """A slot of a service that refuses to publish outside a transaction."""
    slot.app.conf.eda_outside = "raise"
    return slot


def test_only_calls_of_the_user_are_refused(strict: Slot, alert: Any) -> None:
    with pytest.raises(OutsideTransaction, match=r"eda\.outside"):
        alert.delay("failed")
    with strict.eda.outside():
        alert.delay("failed")

    assert strict.waiting() == ["alert"]


def test_celery_itself_may_publish_where_users_may_not(strict: Slot) -> None:
    @strict.app.task(shared=False, bind=True, name="unsure")
    def unsure(self: Any) -> None:
        raise self.retry(countdown=0)

    @strict.app.task(shared=False, name="fails")
    def fails() -> None:
        raise Mishap

    @strict.app.task(shared=False, name="after")
    def after() -> None:
        pass

    @strict.task
    def part() -> None:
        pass

    @strict.task
    def total(parts: Any) -> None:
        pass

    run(strict, unsure.s())
    run(strict, fails.s().on_error(after.si()))
    run(strict, chain(after.si(), after.si()))
    run(strict, chord([after.si(), after.si()], after.si()))
    arrivals = arrived(strict)
    run(strict, chord([part.s(), part.s()], total.s()))

    assert arrivals == ["unsure", "after", "after", "after"]
    assert strict.waiting() == ["total"]


def test_beat_may_publish_where_users_may_not(strict: Slot) -> None:
    from celery.beat import Service

    @strict.app.task(shared=False, name="tick")
    def tick() -> None:
        pass

    strict.app.conf.beat_schedule = {"each": {"task": "tick", "schedule": 0.01}}
    service = Service(strict.app, scheduler_cls="celery.beat:Scheduler")
    _run_in_a_copy_of_the_context(lambda: _tick_once(service))

    assert arrived(strict) == ["tick"]


def _tick_once(service: Any) -> None:
    signals.beat_init.send(sender=service)
    entry = service.scheduler.schedule["each"]
    service.scheduler.apply_async(entry, advance=False)


def _run_in_a_copy_of_the_context(body: Callable[[], None]) -> None:
    import contextvars

    contextvars.copy_context().run(body)
