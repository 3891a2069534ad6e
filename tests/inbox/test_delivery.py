"""What becomes of each delivery: copies, retries and other endings, in one worker slot."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from celery import Task
from celery.exceptions import Ignore, Reject, Retry
from sqlalchemy import insert, select, text
from sqlalchemy.orm import Session

from celery_eda.core.message import Message
from celery_eda.errors import NoNextAttempt
from tests.faults.programs.tables import effects
from tests.support.worker_slot import Slot

# ── copies ───────────────────────────────────────────────────────────────────────────────────────


def test_a_handler_sees_no_headers_but_those_of_the_message(slot: Slot) -> None:
    seen = []

    @slot.task(bind=True)
    def look(self: Any) -> None:
        seen.append(json.loads(json.dumps(self.request.headers)))

    with slot.eda.transaction():
        look.apply_async(headers={"tenant": "north"})
    (message,) = slot.sent()

    assert slot.deliver(message) is None
    assert seen[0].keys() == {"tenant", *message.identity.headers}


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


def foreign(slot: Slot, task: Any, *args: Any, **headers: Any) -> Message:
    """A call as a publisher without this package sends it, with the task id of every night."""
    task.apply_async(args, task_id="nightly")
    (message,) = slot.sent()
    theirs = {k: v for k, v in message.headers.items() if not k.startswith("eda_")}
    return replace(message, headers={**theirs, **headers})


@pytest.mark.parametrize(
    ("args", "headers"),
    [
        ((2,), {}),
        ((1,), {"origin": "gen2@cron"}),
        ((1,), {"eta": "2026-01-02T00:00:00"}),
        ((1,), {"expires": "2036-01-02T00:00:00"}),
    ],
)
def test_a_task_id_that_a_plain_publisher_uses_again_is_another_message(
    slot: Slot, args: tuple[int], headers: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    @slot.task
    def report(day: int) -> None:
        slot.write(day)

    slot.deliver(foreign(slot, report, 1, origin="gen1@cron"))
    slot.deliver(foreign(slot, report, *args, **{"origin": "gen1@cron", **headers}))

    assert slot.effects() == [1, *args]
    assert "taken for a copy" not in caplog.text


@pytest.mark.parametrize("redelivered", [True, False])
def test_a_copy_from_a_plain_publisher_has_no_effect_and_says_so_unless_the_broker_made_it(
    slot: Slot, redelivered: bool, caplog: pytest.LogCaptureFixture
) -> None:
    @slot.task
    def report(day: int) -> None:
        slot.write(day)

    message = foreign(slot, report, 1)
    slot.deliver(message)
    slot.deliver(message, redelivered=redelivered)

    assert slot.effects() == [1]
    assert ("taken for a copy" in caplog.text) is not redelivered


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


# ── retries ──────────────────────────────────────────────────────────────────────────────────────


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


# ── other endings ────────────────────────────────────────────────────────────────────────────────


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


@pytest.fixture
def worker_dies_after_the_commit(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery's own report of a failure never comes."""
    monkeypatch.setattr(slot.app.backend, "mark_as_failure", lambda *_, **__: None)


@pytest.mark.usefixtures("worker_dies_after_the_commit")
def test_errbacks_of_both_styles_find_the_failure_and_its_traceback(slot: Slot) -> None:
    seen = {}

    @slot.app.task(name="new_style", shared=False)
    def new_style(request: Any, error: Exception, traceback: str) -> None:
        result = slot.app.AsyncResult(request.id)
        seen["new style"] = result.state, result.traceback, traceback

    @slot.task
    def old_style(task_id: str) -> None:
        result = slot.app.AsyncResult(task_id)
        seen["old style"] = result.state, result.traceback, result.traceback

    @slot.task
    def fail() -> None:
        raise ValueError("no such order")

    fail.apply_async(link_error=[new_style.s(), old_style.s()])
    slot.work()

    assert seen.keys() == {"new style", "old style"}
    for state, stored, given in seen.values():
        assert state == "FAILURE"
        assert stored == given
        assert stored.startswith("Traceback")
        assert "ValueError: no such order" in stored


def test_errbacks_leave_though_the_result_backend_is_away(
    slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("the result backend is away")

    @slot.task
    def mourn(task_id: str) -> None:
        """An errback."""

    @slot.task
    def fail() -> None:
        raise ValueError

    fail.apply_async(link_error=mourn.s())
    (message,) = slot.sent()
    with monkeypatch.context() as outage:
        outage.setattr(slot.app.backend, "store_result", away)
        ending = slot.deliver(message)

    assert isinstance(ending, Reject)
    assert len(slot.dead()) == 1
    assert slot.waiting() == ["mourn"]


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


def test_the_user_of_the_publisher_is_not_sent_again_by_another_one(slot: Slot) -> None:
    # RabbitMQ refuses a message with the property `user_id` of another user.
    @slot.task(policy=lambda attempts, error: 0.0)
    def fail() -> None:
        raise ValueError("again")

    fail.delay()
    (message,) = slot.sent()
    slot.deliver(replace(message, properties={**message.properties, "user_id": "somebody"}))

    (again,) = slot.sent()
    assert again.identity == message.identity.next
    assert "user_id" not in again.properties
