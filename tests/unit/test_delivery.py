"""What becomes of each delivery, whatever the handler does: one worker slot without its process.

Each message comes out of the outbox as the relay would send it, and is given to the function that
Celery's pools call.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, Task, shared_task
from celery.app.trace import trace_task_ret
from celery.exceptions import Ignore, Reject, Retry
from sqlalchemy import Column, Integer, MetaData, Table, delete, insert, select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from celery_eda import EDA, message_rows
from celery_eda.errors import BrokenTransaction, NoDelivery, NoNextAttempt, UnsafeSetting
from celery_eda.identity import WIRE
from celery_eda.message import Message, Wire
from celery_eda.task import ReliableTask
from tests.databases import Database
from tests.road.tables import effects

#: No two rows with the same number.
unique = Table("unique_numbers", MetaData(), Column("number", Integer, primary_key=True))


class Slot:
    """One slot of a worker: an app, its database, and the messages that wait for it."""

    def __init__(self, database: Database, **settings: Any) -> None:
        self.database = database
        self.engine = database.engine
        self.app = Celery(f"slot-{uuid4()}", broker="memory://", backend="cache+memory://")
        self.app.conf.update(eda_send_after_commit=False, eda_outage_patience=0.0, **settings)
        self.eda = EDA(self.app, engine=database.engine)

    def task(self, function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        """``@eda.task``, named as the function."""
        if function is None:
            return lambda given: self.task(given, **options)
        return self.eda.task(**{"name": function.__name__, **options})(function)

    def write(self, number: int) -> None:
        """Take effect."""
        self.eda.session.execute(insert(effects).values(name="effect", number=number))

    # ── messages ────────────────────────────────────────────────────────────────────────────

    def sent(self) -> list[Message]:
        """Take what waits in the outbox, in the order of publishing, due or not."""
        table = self.database.tables.outbox
        with self.engine.begin() as connection:
            rows = connection.execute(select(table).order_by(table.c.id)).all()
            connection.execute(delete(table))
        return [message_rows.from_row(row) for row in rows]

    def waiting(self) -> list[str]:
        """The tasks of what waits in the outbox."""
        with self.engine.connect() as connection:
            columns = self.database.tables.outbox.c
            return list(connection.scalars(select(columns.task).order_by(columns.id)))

    def deliver(self, message: Message, **delivery_info: Any) -> BaseException | None:
        """Bring *message* to its task.

        Returns:
            The exception that tells Celery how it ended; None after a success.
        """
        headers = dict(message.headers)
        properties = dict(message.properties)
        request = {
            **headers,
            "reply_to": properties.get("reply_to"),
            "correlation_id": properties.get("correlation_id"),
            "properties": properties,
            WIRE: Wire(
                message.body,
                message.content_type,
                message.content_encoding,
                headers,
                properties,
            ),
            "delivery_info": {
                "exchange": message.exchange,
                "routing_key": message.routing_key,
                "priority": 0,
                "redelivered": False,
                **delivery_info,
            },
        }
        failed, result, _ = trace_task_ret(
            message.task,
            headers["id"],
            request,
            message.body,
            message.content_type,
            message.content_encoding,
            app=self.app,
        )
        if not failed:
            return None
        # With a traceback, unless Celery means the exception for itself.
        return getattr(result.exception, "exc", result.exception)

    def work(self, rounds: int = 20) -> list[BaseException | None]:
        """Deliver everything in the outbox, and what that publishes; returns how each ended."""
        endings = []
        for _ in range(rounds):
            if not (messages := self.sent()):
                return endings
            endings += [self.deliver(each) for each in messages]
        raise AssertionError(f"no end after {rounds} rounds")

    # ── what happened ───────────────────────────────────────────────────────────────────────

    def effects(self) -> list[int]:
        """The numbers that took effect."""
        with self.engine.connect() as connection:
            return sorted(connection.scalars(select(effects.c.number)))

    def outcomes(self) -> list[tuple[int, str]]:
        """Revision and outcome of each attempt."""
        columns = self.database.tables.inbox.c
        with self.engine.connect() as connection:
            rows = connection.execute(select(columns.revision, columns.outcome))
            return sorted(tuple(row) for row in rows)

    def dead(self) -> Sequence[Any]:
        """The dead letters."""
        with self.engine.connect() as connection:
            return connection.execute(select(self.database.tables.dead_letters)).all()

    def result(self, message: Message) -> Any:
        """What somebody who waits for the result of *message* gets."""
        return self.app.AsyncResult(message.headers["id"])


@pytest.fixture
def slot(shared_database: Database) -> Iterator[Slot]:
    """A slot on each database, with empty tables."""
    for table in (effects, unique):
        table.create(shared_database.engine, checkfirst=True)
    yield Slot(shared_database)
    with shared_database.engine.begin() as connection:
        for table in (*shared_database.tables.all, effects, unique):
            connection.execute(delete(table))


# ── copies ──────────────────────────────────────────────────────────────────────────────────


def test_a_copy_of_a_done_message_returns_the_recorded_result(slot: Slot) -> None:
    @slot.task
    def once(number: int) -> dict[str, int]:
        slot.write(number)
        return {"number": number, "calls": len(slot.effects()) + 1}

    once.delay(7)
    (message,) = slot.sent()
    slot.deliver(message)
    slot.app.backend.forget(message.headers["id"])

    assert slot.deliver(message, redelivered=True) is None
    assert slot.result(message).result == {"number": 7, "calls": 1}
    assert slot.effects() == [7]


@pytest.mark.parametrize("result", [None, 0, "", [], "a\u2028\U0001f600", {"a": [1.5, None]}])
def test_a_copy_returns_any_result_as_it_was(slot: Slot, result: Any) -> None:
    calls = []

    @slot.task
    def answer() -> Any:
        calls.append(1)
        return result

    answer.delay()
    (message,) = slot.sent()
    slot.deliver(message)
    slot.app.backend.forget(message.headers["id"])
    slot.deliver(message)

    assert slot.result(message).get() == result
    assert len(calls) == 1


def test_nothing_is_recorded_of_a_result_that_nobody_can_ask_for(slot: Slot) -> None:
    @slot.task(ignore_result=True)
    def silent() -> Any:
        return object()

    silent.delay()

    assert slot.work() == [None]
    assert slot.outcomes() == [(0, "done")]


def test_a_result_that_cannot_be_serialized_fails_the_attempt(slot: Slot) -> None:
    @slot.task
    def odd(number: int) -> Any:
        slot.write(number)
        return object()

    odd.delay(7)
    (ending,) = slot.work()

    assert "object" in str(ending)
    assert slot.effects() == []
    assert [each.reason for each in slot.dead()] == ["failed"]


def test_a_copy_of_a_dead_message_does_nothing_and_leaves_its_failure(slot: Slot) -> None:
    @slot.task
    def fail(number: int) -> None:
        slot.write(number)
        raise ValueError(f"no {number}")

    fail.delay(7)
    (message,) = slot.sent()
    first = slot.deliver(message)
    second = slot.deliver(message)

    assert isinstance(first, ValueError)
    assert isinstance(second, Ignore)
    assert slot.result(message).state == "FAILURE"
    assert len(slot.dead()) == 1


def test_a_copy_of_a_retried_message_does_nothing_and_leaves_the_result(slot: Slot) -> None:
    @slot.task(bind=True)
    def twice(self: Task, number: int) -> int:
        slot.write(number + self.request.retries)
        if not self.request.retries:
            raise self.retry(countdown=60)
        return number

    twice.delay(10)
    (message,) = slot.sent()
    slot.deliver(message)
    slot.work()

    assert isinstance(slot.deliver(message), Ignore)
    assert slot.result(message).result == 10
    assert slot.effects() == [11]
    assert slot.outcomes() == [(0, "retried"), (1, "done")]


def test_a_copy_of_an_ignored_message_does_nothing(slot: Slot) -> None:
    @slot.task
    def give_up(number: int) -> None:
        slot.write(number)
        raise Ignore

    give_up.delay(7)
    (message,) = slot.sent()

    assert isinstance(slot.deliver(message), Ignore)
    assert isinstance(slot.deliver(message), Ignore)
    assert slot.effects() == [7]
    assert slot.outcomes() == [(0, "skipped")]


def test_a_message_of_a_plain_publisher_takes_effect_once_for_each_attempt(slot: Slot) -> None:
    @slot.task(bind=True)
    def twice(self: Task, number: int) -> None:
        slot.write(number + self.request.retries)
        if not self.request.retries:
            raise self.retry()

    twice.delay(10)
    (message,) = slot.sent()
    headers = {k: v for k, v in message.headers.items() if not k.startswith("eda_")}
    foreign = replace(message, headers=headers)
    slot.deliver(foreign)
    slot.deliver(foreign)
    (following,) = slot.sent()
    slot.deliver(following)
    slot.deliver(replace(foreign, headers={**headers, "retries": 1}))

    assert slot.effects() == [11]


@pytest.mark.parametrize(
    "headers",
    [
        {"eda_id": "no id"},
        {"eda_id": 7},
        {"eda_id": {"a": 1}},
        {"eda_revision": -1},
        {"eda_revision": "1"},
        {"eda_revision": 2**40},
    ],
)
def test_a_message_with_a_malformed_identity_is_a_dead_letter(
    slot: Slot, headers: dict[str, Any]
) -> None:
    @slot.task
    def once(number: int) -> None:
        slot.write(number)

    once.delay(7)
    (message,) = slot.sent()
    broken = replace(message, headers={**message.headers, **headers})

    assert isinstance(slot.deliver(broken), ValueError)
    assert isinstance(slot.deliver(broken), Ignore)
    assert [each.reason for each in slot.dead()] == ["malformed"]
    assert slot.effects() == []


# ── retries ─────────────────────────────────────────────────────────────────────────────────


def test_retries_undo_the_failed_attempts_and_count(slot: Slot) -> None:
    @slot.task
    def note(number: int) -> None:
        slot.write(number)

    @slot.task(bind=True, max_retries=5)
    def flaky(self: Task, number: int) -> int:
        slot.write(number + self.request.retries)
        note.delay(100 + self.request.retries)
        if self.request.retries < 2:
            raise self.retry(countdown=60)
        return number

    flaky.delay(10)
    (message,) = slot.sent()
    slot.deliver(message)
    slot.work()

    assert slot.effects() == [12, 102]
    assert slot.outcomes() == [(0, "done"), (0, "retried"), (1, "retried"), (2, "done")]
    assert slot.result(message).result == 10


def test_the_delay_of_a_retry_is_kept_in_the_outbox(slot: Slot) -> None:
    @slot.task(bind=True)
    def later(self: Task) -> None:
        raise self.retry(countdown=3600)

    later.delay()
    slot.deliver(*slot.sent())

    columns = slot.database.tables.outbox.c
    with slot.engine.connect() as connection:
        created, available = connection.execute(
            select(columns.created_at, columns.available_at)
        ).one()
    assert 3590 < (available - created).total_seconds() < 3610


def test_a_message_without_retries_left_is_a_dead_letter_with_the_real_error(slot: Slot) -> None:
    @slot.task(bind=True, max_retries=1)
    def declined(self: Task, number: int) -> None:
        slot.write(number)
        try:
            raise LookupError("card \u00e9 declined")
        except LookupError as error:
            raise self.retry(exc=error, countdown=0) from error

    declined.delay(7)
    (message,) = slot.sent()
    slot.deliver(message)
    slot.work()

    (letter,) = slot.dead()
    assert (letter.task, letter.consumer) == ("declined", "declined")
    assert letter.reason == "retries exhausted"
    assert (letter.error_type, letter.error) == ("LookupError", "card \u00e9 declined")
    assert "declined" in letter.traceback
    assert letter.message_id == message.identity.id
    assert (letter.revision, letter.attempts) == (1, 2)
    assert json.loads(letter.body)[0] == [7]
    assert slot.outcomes() == [(0, "retried"), (1, "dead")]
    assert slot.effects() == []
    assert slot.result(message).state == "FAILURE"


def test_autoretry_goes_through_the_outbox(slot: Slot) -> None:
    calls = []

    @slot.task(autoretry_for=(LookupError,), max_retries=3, retry_backoff=True)
    def flaky(number: int) -> None:
        calls.append(number)
        slot.write(number)
        if len(calls) < 3:
            raise LookupError

    flaky.delay(7)
    slot.work()

    assert len(calls) == 3
    assert slot.effects() == [7]
    assert slot.outcomes() == [(0, "retried"), (1, "retried"), (2, "done")]


def test_a_retry_that_is_not_thrown_keeps_the_attempt(slot: Slot) -> None:
    @slot.task(bind=True)
    def again(self: Task, number: int) -> None:
        slot.write(number + self.request.retries)
        if not self.request.retries:
            self.retry(throw=False)

    again.delay(10)
    slot.work()

    assert slot.effects() == [10, 11]
    assert slot.outcomes() == [(0, "done"), (1, "done")]


def test_a_retry_inside_a_savepoint_leaves(slot: Slot) -> None:
    @slot.task(bind=True)
    def nested(self: Task, number: int) -> None:
        with slot.eda.transaction() as session:
            session.execute(insert(effects).values(name="effect", number=number))
            if not self.request.retries:
                raise self.retry()

    nested.delay(7)
    slot.work()

    assert slot.effects() == [7]
    assert slot.outcomes() == [(0, "retried"), (1, "done")]


def test_a_bare_retry_is_a_dead_letter_that_says_so(slot: Slot) -> None:
    @slot.task
    def bare(number: int) -> None:
        slot.write(number)
        raise Retry("later")

    bare.delay(7)
    (message,) = slot.sent()

    assert isinstance(slot.deliver(message), NoNextAttempt)
    assert slot.result(message).state == "FAILURE"
    assert [each.error_type for each in slot.dead()] == ["NoNextAttempt"]


def test_a_retry_that_the_outbox_refuses_is_a_dead_letter(slot: Slot) -> None:
    if slot.database.vendor == "sqlite":
        pytest.skip("SQLite takes text of any length")

    @slot.task(bind=True)
    def elsewhere(self: Task) -> None:
        raise self.retry(queue="q" * 300)

    elsewhere.delay()
    slot.work()

    assert [each.task for each in slot.dead()] == ["elsewhere"]
    assert slot.outcomes() == [(0, "dead")]


# ── other endings ───────────────────────────────────────────────────────────────────────────


def test_a_replaced_task_commits_its_effects_and_its_replacement(slot: Slot) -> None:
    @slot.task
    def add(left: int, right: int) -> int:
        slot.write(left)
        return left + right

    @slot.task(bind=True)
    def swap(self: Task, number: int) -> None:
        slot.write(number)
        raise self.replace(add.s(number + 1, 1000))

    swap.delay(7)
    (message,) = slot.sent()
    slot.deliver(message)
    slot.work()

    assert slot.effects() == [7, 8]
    assert slot.result(message).result == 1008


def test_a_message_rejected_for_good_is_a_dead_letter_first(slot: Slot) -> None:
    @slot.task
    def refuse(number: int) -> None:
        slot.write(number)
        raise Reject("unwanted", requeue=False)

    refuse.delay(7)
    (message,) = slot.sent()
    ending = slot.deliver(message)

    assert isinstance(ending, Reject)
    assert not ending.requeue
    assert [each.reason for each in slot.dead()] == ["rejected"]
    assert slot.effects() == []
    assert isinstance(slot.deliver(message), Ignore)


def test_a_message_given_back_is_undone_and_comes_again(slot: Slot) -> None:
    calls = []

    @slot.task
    def refuse(number: int) -> None:
        slot.write(number)
        calls.append(number)
        if len(calls) == 1:
            raise Reject(requeue=True)

    refuse.delay(7)
    (message,) = slot.sent()
    ending = slot.deliver(message)
    slot.deliver(message, redelivered=True)

    assert isinstance(ending, Reject)
    assert ending.requeue
    assert slot.effects() == [7]
    assert slot.dead() == []


def test_a_handler_without_memory_gives_its_message_back(slot: Slot) -> None:
    @slot.task
    def greedy(number: int) -> None:
        slot.write(number)
        raise MemoryError

    greedy.delay(7)
    (message,) = slot.sent()
    ending = slot.deliver(message)

    assert isinstance(ending, Reject)
    assert ending.requeue
    assert slot.outcomes() == []


@pytest.mark.parametrize("error", [Reject(requeue=True), SystemExit(3), MemoryError()])
def test_a_message_that_always_comes_back_is_a_dead_letter_in_the_end(
    slot: Slot, error: BaseException
) -> None:
    calls = []

    @slot.task
    def endless(number: int) -> None:
        slot.write(number)
        calls.append(number)
        raise error

    endless.delay(7)
    (message,) = slot.sent()
    endings = [slot.deliver(message)]
    while isinstance(endings[-1], Reject) and len(endings) < 20:
        endings.append(slot.deliver(message, redelivered=True))

    assert len(calls) == 6
    assert [each.reason for each in slot.dead()] == ["lost worker"]
    assert slot.result(message).state == "FAILURE"
    assert slot.effects() == []
    assert isinstance(slot.deliver(message), Ignore)


def test_a_worker_lost_before_it_told_of_a_failure_is_stood_in_for(slot: Slot) -> None:
    calls = []

    @slot.task
    def doomed(number: int) -> None:
        calls.append(number)
        raise LookupError(number)

    doomed.delay(7)
    (message,) = slot.sent()
    slot.deliver(message)
    again = slot.deliver(message, redelivered=True)

    assert isinstance(again, LookupError)
    assert again.args == (7,)
    assert calls == [7]
    assert [each.reason for each in slot.dead()] == ["failed"]


def test_the_count_of_redeliveries_goes_with_the_outcome(slot: Slot) -> None:
    @slot.task
    def once(number: int) -> None:
        slot.write(number)

    once.delay(7)
    (message,) = slot.sent()
    slot.deliver(message, redelivered=True)

    with slot.engine.connect() as connection:
        assert connection.execute(select(slot.database.tables.attempts)).all() == []
    assert slot.effects() == [7]


def test_wrong_arguments_are_a_dead_letter(slot: Slot) -> None:
    @slot.task
    def once(session: Session, number: int) -> None:
        slot.write(number)

    slot.app.send_task("once", (1, 2, 3))
    (ending,) = slot.work()

    assert isinstance(ending, TypeError)
    assert [each.error_type for each in slot.dead()] == ["TypeError"]


def test_a_dead_letter_is_written_whatever_the_error_says(slot: Slot) -> None:
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    @slot.task
    def fail() -> None:
        raise Unspeakable("\0\ud800")

    fail.delay()
    slot.work()

    assert [each.error_type for each in slot.dead()] == [
        f"{test_a_dead_letter_is_written_whatever_the_error_says.__name__}.<locals>.Unspeakable"
    ]


def test_a_failed_message_in_another_serialization_is_a_dead_letter(slot: Slot) -> None:
    slot.app.conf.accept_content = ["json", "pickle"]

    @slot.task
    def fail(number: complex) -> None:
        raise ValueError(number)

    fail.apply_async((1j,), serializer="pickle")
    slot.work()

    assert [each.error for each in slot.dead()] == ["1j"]


def test_an_errback_that_fails_does_not_cost_the_dead_letter(slot: Slot) -> None:
    @slot.task
    def mourn(request: Any, error: Any, traceback: Any) -> None:
        slot.eda.session.execute(text("SELECT nonsense FROM nowhere"))

    @slot.task
    def fail(number: int) -> None:
        raise ValueError(number)

    fail.apply_async((7,), link_error=mourn.s())
    (ending,) = slot.work()

    assert isinstance(ending, ValueError)
    assert [each.error_type for each in slot.dead()] == ["ValueError"]
    assert slot.effects() == []


def test_an_errback_takes_effect_together_with_the_dead_letter(slot: Slot) -> None:
    @slot.task
    def mourn(request: Any, error: Any, traceback: Any) -> None:
        slot.write(8)

    @slot.task
    def fail(number: int) -> None:
        slot.write(number)
        raise ValueError(number)

    fail.apply_async((7,), link_error=mourn.s())
    slot.work()

    assert slot.effects() == [8]
    assert len(slot.dead()) == 1


def test_a_dead_letter_that_cannot_be_written_leaves_the_message_with_the_broker(
    slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    @slot.task
    def fail(number: int) -> None:
        raise ValueError(number)

    fail.delay(7)
    (message,) = slot.sent()
    dead_letters = slot.database.tables.dead_letters
    dead_letters.drop(slot.engine)
    ending = slot.deliver(message)
    dead_letters.create(slot.engine)
    slot.deliver(message, redelivered=True)

    assert isinstance(ending, Reject)
    assert ending.requeue
    assert [each.error_type for each in slot.dead()] == ["ValueError"]


# ── handlers that meddle with the transaction ───────────────────────────────────────────────


def test_a_swallowed_error_of_a_statement_costs_nothing_or_is_told(slot: Slot) -> None:
    @slot.task
    def careless(session: Session, number: int) -> None:
        slot.write(number)
        with suppress(SQLAlchemyError):
            session.execute(text("SELECT nonsense FROM nowhere"))

    careless.delay(7)
    slot.work()

    if slot.database.vendor == "postgresql":  # which gives the whole transaction up
        assert [each.error_type for each in slot.dead()] == ["BrokenTransaction"]
        assert slot.effects() == []
    else:
        assert slot.effects() == [7]


def test_a_swallowed_deadlock_is_told(slot: Slot) -> None:
    if slot.database.vendor == "sqlite":
        pytest.skip("SQLite has no row locks")
    with slot.engine.begin() as connection:
        connection.execute(insert(unique), [{"number": 1}, {"number": 2}])
    first, second = (update(unique).where(unique.c.number == n).values(number=n) for n in (1, 2))
    rival_has_second, handler_has_first = threading.Event(), threading.Event()

    def rival() -> None:
        with slot.engine.begin() as connection:
            if slot.database.vendor == "postgresql":  # gives up the one that first looks round
                connection.execute(text("SET LOCAL deadlock_timeout = '60s'"))
            # The one that has written less is given up by MariaDB.
            connection.execute(insert(effects), [{"name": "rival", "number": 0}] * 50)
            connection.execute(second)
            rival_has_second.set()
            handler_has_first.wait(30)
            connection.execute(first)

    @slot.task
    def careless(session: Session, number: int) -> None:
        slot.write(number)
        session.execute(first)
        handler_has_first.set()
        rival_has_second.wait(30)
        with suppress(OperationalError):
            session.execute(second)
        if slot.database.vendor == "mariadb":
            slot.write(number + 1)

    thread = threading.Thread(target=rival)
    thread.start()
    careless.delay(7)
    (ending,) = slot.work()
    thread.join()

    assert isinstance(ending, BrokenTransaction)
    assert set(slot.effects()) == {0}
    assert slot.outcomes() == [(0, "dead")]


def test_an_error_inside_a_savepoint_may_be_swallowed(slot: Slot) -> None:
    @slot.task
    def careful(session: Session, number: int) -> None:
        slot.write(number)
        session.execute(insert(unique).values(number=number))
        try:
            with session.begin_nested():
                slot.write(number + 1)
                session.execute(insert(unique).values(number=number))
        except IntegrityError:
            slot.write(number + 2)

    careful.delay(7)

    assert slot.work() == [None]
    assert slot.effects() == [7, 9]


def test_a_handler_that_rolls_back_is_a_dead_letter_that_says_so(slot: Slot) -> None:
    @slot.task
    def rebel(session: Session, number: int) -> None:
        slot.write(number)
        session.rollback()
        slot.write(number + 1)

    rebel.delay(7)
    (ending,) = slot.work()

    assert isinstance(ending, BrokenTransaction)
    assert "begin_nested" in str(ending)
    assert slot.effects() == []
    assert slot.outcomes() == [(0, "dead")]


def test_a_session_may_be_committed_but_nothing_is_before_the_message(slot: Slot) -> None:
    @slot.task
    def eager(session: Session, number: int) -> None:
        slot.write(number)
        session.commit()
        assert slot.effects() == []
        slot.write(number + 1)
        if number == 10:
            raise ValueError(number)

    eager.delay(7)
    eager.delay(10)
    slot.work()

    assert slot.effects() == [7, 8]
    assert len(slot.dead()) == 1


@pytest.mark.parametrize("swallowed", [False, True])
def test_a_handler_cannot_commit_its_connection(slot: Slot, swallowed: bool) -> None:
    @slot.task
    def rebel(session: Session, number: int) -> None:
        slot.write(number)
        try:
            session.connection().commit()
        except BrokenTransaction:
            if not swallowed:
                raise

    rebel.delay(7)
    (ending,) = slot.work()

    assert isinstance(ending, BrokenTransaction)
    assert slot.effects() == []
    assert slot.outcomes() == [(0, "dead")]


def test_a_transaction_inside_a_task_is_a_savepoint_of_its_own(slot: Slot) -> None:
    @slot.task
    def note(number: int) -> None:
        slot.write(number)

    @slot.task
    def nested(number: int) -> None:
        with slot.eda.transaction() as session:
            session.execute(insert(effects).values(name="effect", number=number))
            note.delay(number + 1)
        with suppress(LookupError), slot.eda.transaction() as session:
            session.execute(insert(effects).values(name="effect", number=number + 2))
            note.delay(number + 3)
            raise LookupError
        if number == 20:
            raise ValueError(number)

    nested.delay(10)
    nested.delay(20)
    slot.work()

    assert slot.effects() == [10, 11]


def test_a_session_of_an_attached_sessionmaker_joins(slot: Slot) -> None:
    sessions = sessionmaker(slot.engine)
    slot.eda.attach(sessions)

    @slot.task
    def note(number: int) -> None:
        slot.write(number)

    @slot.task
    def legacy(number: int) -> None:
        with sessions() as session:
            session.execute(insert(effects).values(name="effect", number=number))
            note.delay(number + 1)
            session.commit()
        if number == 20:
            raise ValueError(number)

    legacy.delay(10)
    legacy.delay(20)
    slot.work()

    assert slot.effects() == [10, 11]


def test_an_asynchronous_session_of_an_attached_sessionmaker_joins(slot: Slot) -> None:
    drivers = {"postgresql": "postgresql+psycopg", "sqlite": "sqlite+aiosqlite"}
    if slot.database.vendor not in drivers:
        pytest.skip("no asyncio driver for MariaDB is supported")
    url = slot.engine.url.set(drivername=drivers[slot.database.vendor])
    sessions = async_sessionmaker(create_async_engine(url))
    slot.eda.attach(sessions)

    @slot.task
    async def legacy(number: int) -> None:
        async with sessions() as session:
            await session.execute(insert(effects).values(name="effect", number=number))
            await session.commit()
        if number == 20:
            raise ValueError(number)

    legacy.delay(10)
    legacy.delay(20)
    slot.work()

    assert slot.effects() == [10]
    assert [each.error for each in slot.dead()] == ["20"]


# ── async def ───────────────────────────────────────────────────────────────────────────────


def test_an_async_handler_and_its_child_tasks_publish_into_its_transaction(slot: Slot) -> None:
    @slot.task
    def note(number: int) -> None:
        slot.write(number)

    @slot.task
    async def fan_out(session: Session, number: int) -> int:
        session.execute(insert(effects).values(name="effect", number=number))

        async def child(n: int) -> None:
            await asyncio.sleep(0)
            note.delay(n)

        await asyncio.gather(*(child(number + n) for n in (1, 2, 3)))
        if number == 20:
            raise ValueError(number)
        return number

    fan_out.delay(10)
    fan_out.delay(20)
    (message, _) = messages = slot.sent()
    for each in messages:
        slot.deliver(each)
    slot.work()

    assert slot.effects() == [10, 11, 12, 13]
    assert slot.result(message).result == 10


def test_an_async_handler_can_be_retried(slot: Slot) -> None:
    @slot.task(bind=True)
    async def flaky(self: Task, session: Session, number: int) -> None:
        slot.write(number + self.request.retries)
        await asyncio.sleep(0)
        if not self.request.retries:
            raise self.retry()

    @slot.task(bind=True, autoretry_for=(LookupError,))
    async def automatic(self: Task, number: int) -> None:
        slot.write(number + self.request.retries)
        await asyncio.sleep(0)
        if not self.request.retries:
            raise LookupError

    flaky.delay(10)
    automatic.delay(20)
    slot.work()

    assert slot.effects() == [11, 21]


def test_an_async_task_can_be_awaited_by_another(slot: Slot) -> None:
    @slot.task
    async def inner(session: Session, number: int) -> int:
        await asyncio.sleep(0)
        slot.write(number)
        return number

    @slot.task
    async def outer(number: int) -> int:
        return 1 + await inner(number)

    outer.delay(7)
    (message,) = slot.sent()
    slot.deliver(message)

    assert slot.result(message).result == 8
    assert slot.effects() == [7]


# ── tasks that are not decorated, and calls that are no deliveries ──────────────────────────


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

    named.eda.make_reliable(named.app)
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


def test_options_that_would_lose_messages_are_refused(slot: Slot) -> None:
    with pytest.raises(UnsafeSetting, match="acks_late"):
        slot.task(acks_late=False)(lambda: None)


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
