"""Failed attempts that a policy lets be tried again: one worker slot without its process."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from celery import Task, chord, group
from celery.exceptions import Retry
from celery.signals import task_retry
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from celery_eda import RetryPolicy
from celery_eda.core.identity import Identity
from celery_eda.core.message import Message
from celery_eda.errors import ConfigurationError
from tests.support.worker_slot import Slot

QUICK = RetryPolicy(attempts=3, first=0, longest=0, on=(LookupError,))


def reasons(slot: Slot) -> list[tuple[str, str, int]]:
    return [(each.error_type, each.reason, each.attempts) for each in slot.dead()]


def flaky(slot: Slot, failures: int, **options: Any) -> Task:
    """A task that takes effect and then fails, as often as told."""

    @slot.task(bind=True, **{"policy": QUICK, **options})
    def flaky(self: Task, number: int) -> int:
        slot.write(number + self.request.retries)
        if self.request.retries < failures:
            raise LookupError(f"not yet {self.request.retries}")
        return number

    return flaky


def test_a_failed_attempt_is_undone_and_the_next_one_takes_effect(slot: Slot) -> None:
    flaky(slot, 2).delay(10)
    (message,) = slot.sent()
    first = slot.deliver(message)
    endings = slot.work()

    assert [type(first), *map(type, endings)] == [Retry, Retry, type(None)]
    assert slot.effects() == [12]
    assert slot.outcomes() == [(0, "retried"), (1, "retried"), (2, "done")]
    assert slot.result(message).result == 10
    assert slot.dead() == []


def test_the_next_attempt_is_the_same_message_one_revision_on(slot: Slot) -> None:
    flaky(slot, 1).apply_async((10,), priority=5, headers={"trace": "t1"}, queue="quick")
    (message,) = slot.sent()
    slot.deliver(message)
    (following,) = slot.sent()

    assert following.identity == Identity(message.identity.id, 1)
    assert following.body == message.body
    assert following.headers == {**message.headers, "retries": 1, "eda_revision": 1}
    assert following.properties["priority"] == 5
    assert following.properties.items() <= message.properties.items()
    assert (following.exchange, following.routing_key) == (message.exchange, message.routing_key)


def test_celery_hears_of_the_retry(slot: Slot) -> None:
    heard = []

    def note(sender: Task, reason: Retry, **_: Any) -> None:
        heard.append((sender.name, repr(reason.exc)))

    task_retry.connect(note)
    try:
        flaky(slot, 1).delay(10)
        (message,) = slot.sent()
        slot.deliver(message)
    finally:
        task_retry.disconnect(note)

    assert slot.result(message).state == "RETRY"
    assert heard == [("flaky", "LookupError('not yet 0')")]


def test_the_wait_is_kept_in_the_outbox(slot: Slot) -> None:
    flaky(slot, 1, policy=lambda attempts, error: 3600).delay(10)
    slot.deliver(*slot.sent())

    columns = slot.database.tables.outbox.c
    with slot.engine.connect() as connection:
        created, due = connection.execute(select(columns.created_at, columns.available_at)).one()
    assert 3590 < (due - created).total_seconds() < 3610


def test_a_policy_that_gives_up_leaves_a_dead_letter_with_the_error_and_all_attempts(
    slot: Slot,
) -> None:
    flaky(slot, 99).delay(10)
    (message,) = slot.sent()
    slot.deliver(message)
    slot.work()

    assert reasons(slot) == [("LookupError", "retries exhausted", 3)]
    assert slot.outcomes() == [(0, "retried"), (1, "retried"), (2, "dead")]
    assert slot.effects() == []
    assert slot.result(message).state == "FAILURE"


def test_an_error_that_is_not_worth_another_attempt_is_a_dead_letter_at_once(slot: Slot) -> None:
    @slot.task(policy=QUICK)
    def wrong(number: int) -> None:
        raise ValueError(number)

    wrong.delay(7)
    slot.work()

    assert reasons(slot) == [("ValueError", "failed", 1)]


def test_a_policy_is_any_callable_and_is_told_the_attempts_and_the_error(slot: Slot) -> None:
    asked: list[tuple[int, str]] = []

    def policy(attempts: int, error: Exception) -> float | None:
        asked.append((attempts, str(error)))
        return 0 if attempts < 3 else None

    flaky(slot, 99, policy=policy).delay(10)
    slot.work()

    assert asked == [(1, "not yet 0"), (2, "not yet 1"), (3, "not yet 2")]


def test_attempts_are_those_of_the_message_whoever_makes_them(slot: Slot) -> None:
    flaky(slot, 99).delay(10)
    slot.deliver(*slot.sent())
    (second,) = slot.sent()
    slot.deliver(second)
    slot.deliver(second)  # a copy is no attempt
    (third,) = slot.sent()
    slot.deliver(third)

    assert third.identity.revision == 2
    assert slot.sent() == []
    assert reasons(slot) == [("LookupError", "retries exhausted", 3)]


@pytest.mark.parametrize("answer", ["soon", float("inf"), 1e300, 1e12, object()])
def test_a_policy_that_answers_nonsense_gives_up(slot: Slot, answer: Any) -> None:
    flaky(slot, 99, policy=lambda attempts, error: answer).delay(10)
    slot.work()

    assert reasons(slot) == [("LookupError", "failed", 1)]


def test_a_policy_that_fails_gives_up_and_the_dead_letter_keeps_the_error(
    slot: Slot, caplog: pytest.LogCaptureFixture
) -> None:
    def policy(attempts: int, error: Exception) -> float | None:
        raise ZeroDivisionError

    flaky(slot, 99, policy=policy).delay(10)
    slot.work()

    assert reasons(slot) == [("LookupError", "failed", 1)]
    assert any("ZeroDivisionError" in (each.exc_text or "") for each in caplog.records)


def test_the_setting_is_the_policy_of_tasks_without_one(slot: Slot) -> None:
    slot.app.conf.eda_retry_policy = "tests.inbox.test_retry_policies:QUICK"
    flaky(slot, 99, policy=None).delay(10)
    slot.work()

    assert reasons(slot) == [("LookupError", "retries exhausted", 3)]


def test_the_policy_of_a_task_goes_before_the_setting(slot: Slot) -> None:
    slot.app.conf.eda_retry_policy = QUICK
    flaky(slot, 99, policy=RetryPolicy(attempts=1)).delay(10)
    slot.work()

    assert reasons(slot) == [("LookupError", "failed", 1)]


@pytest.mark.parametrize(
    "given", ["nowhere:policy", "tests.inbox.test_retry_policies:nothing", 7, int]
)
def test_a_setting_that_is_no_policy_stops_the_worker_from_starting(slot: Slot, given: Any) -> None:
    slot.app.conf.eda_retry_policy = given

    with pytest.raises(ConfigurationError, match="policy"):
        slot.eda.check()


def test_what_cannot_be_called_is_no_policy_of_a_task(slot: Slot) -> None:
    with pytest.raises(ConfigurationError, match="policy"):
        slot.task(policy=3)(len)


def test_an_outage_is_no_attempt(slot: Slot) -> None:
    asked = []

    def policy(attempts: int, error: Exception) -> float | None:
        asked.append(error)
        return 0.0

    @slot.task(policy=policy)
    def cut_off(number: int) -> None:
        slot.write(number)
        error = OperationalError("SELECT 1", {}, Exception())
        error.connection_invalidated = True
        raise error

    cut_off.delay(7)
    slot.work()

    assert asked == []
    assert slot.outcomes() == []


def test_a_retry_by_hand_is_the_handlers_own_and_counts(slot: Slot) -> None:
    @slot.task(bind=True, policy=QUICK, max_retries=99)
    def mixed(self: Task, number: int) -> None:
        if self.request.retries % 2:
            raise self.retry(countdown=0)
        raise LookupError

    mixed.delay(7)
    slot.work()

    assert slot.outcomes() == [(0, "retried"), (1, "retried"), (2, "dead")]
    assert reasons(slot) == [("LookupError", "retries exhausted", 3)]


def test_no_policy_is_asked_when_the_handlers_own_retries_are_used_up(slot: Slot) -> None:
    @slot.task(bind=True, max_retries=1, policy=lambda attempts, error: 0.0)
    def by_hand(self: Task) -> None:
        raise self.retry(countdown=0)

    by_hand.delay()
    slot.work()

    assert reasons(slot) == [("MaxRetriesExceededError", "retries exhausted", 2)]


def test_a_message_keeps_its_place_among_those_of_its_key(slot: Slot) -> None:
    task = flaky(slot, 1, key="number")
    task.delay(10)
    task.delay(10)
    first, second = slot.sent()
    slot.deliver(first)
    slot.deliver(second)
    (following,) = slot.sent()

    assert following.headers["eda_order"] == first.headers["eda_order"]

    slot.deliver(following)
    slot.work()

    assert slot.effects() == [11, 11]
    assert slot.outcomes() == [(0, "retried"), (0, "retried"), (1, "done"), (1, "done")]


def test_links_chains_and_errbacks_follow_the_attempt_that_takes_effect(slot: Slot) -> None:
    @slot.task
    def note(number: int) -> int:
        slot.write(number)
        return number + 1

    (flaky(slot, 1).s(10) | note.s()).apply_async(link=note.s())
    slot.work()

    assert slot.effects() == [10, 11, 11]


def test_a_chord_waits_for_the_attempt_that_takes_effect(slot: Slot) -> None:
    @slot.task
    def total(numbers: list[int]) -> None:
        slot.write(100 + sum(numbers))

    task = flaky(slot, 1)
    chord(group(task.s(10), task.s(20)), total.s()).apply_async()
    (one, other) = (each for each in slot.sent() if each.task == "flaky")
    chords = [json.loads(each.body)[2]["chord"] for each in (one, other)]
    slot.deliver(one)
    slot.deliver(other)
    following = slot.sent()

    assert [json.loads(each.body)[2]["chord"] for each in following] == chords


def test_a_message_of_a_plain_publisher_is_tried_again_too(slot: Slot) -> None:
    flaky(slot, 1).delay(10)
    (message,) = slot.sent()
    headers = {k: v for k, v in message.headers.items() if not k.startswith("eda_")}
    foreign: Message = replace(message, headers=headers)
    slot.deliver(foreign)
    slot.deliver(foreign)
    slot.work()

    assert slot.effects() == [11]
    assert slot.outcomes() == [(0, "retried"), (1, "done")]
