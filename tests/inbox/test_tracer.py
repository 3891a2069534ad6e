"""Celery's own steps around a reliable task neither lose its message nor answer in its place."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Task, chain, chord
from celery.exceptions import Reject
from celery.states import FAILURE, RETRY, STARTED

from celery_eda.core.message import Message
from celery_eda.outbox import result_backend
from tests.support.worker_slot import Slot


class Away:
    """The result backend of a slot, which is away whenever it is to store one of *states*."""

    def __init__(self, slot: Slot, *states: str) -> None:
        self.states = states
        self._store = slot.app.backend.store_result
        slot.app.backend.store_result = self.store_result

    def store_result(self, task_id: str, result: Any, state: str, **options: Any) -> Any:
        if state in self.states:
            raise ConnectionError("the result backend is away")
        return self._store(task_id, result, state, **options)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.states = ()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def is_requeued(ending: BaseException | None) -> bool:
    return isinstance(ending, Reject) and ending.requeue


def message_of(slot: Slot, canvas: Any) -> Message:
    """The first message of *canvas*, with which its prerequisites are met."""
    with slot.eda.transaction():
        canvas.apply_async()
    *_, last = messages = slot.sent()
    for each in messages:
        result_backend.run_prerequisites(slot.app, each.prerequisites, each.identity)
    return last


def test_a_backend_that_cannot_store_that_a_task_has_started_loses_no_message(
    slot: Slot, caplog: pytest.LogCaptureFixture
) -> None:
    slot.app.conf.task_track_started = True

    @slot.task
    def mourn(task_id: str) -> None:
        """An errback."""

    @slot.task
    def once(number: int) -> None:
        slot.write(number)

    message = message_of(slot, once.s(7).on_error(mourn.s()))
    with Away(slot, STARTED):
        ending = slot.deliver(message)
    state = slot.result(message).state
    slot.deliver(message, redelivered=True)

    assert is_requeued(ending)
    assert "Celery has not called the task" in caplog.text
    assert state != FAILURE
    assert slot.sent() == []
    assert slot.effects() == [7]


def test_a_failure_before_the_task_is_called_loses_no_message(slot: Slot) -> None:
    @slot.task
    def once(number: int) -> None:
        slot.write(number)

    message = message_of(slot, once.s(7))
    slot.app.loader.on_task_init = lambda *_: 1 / 0
    ending = slot.deliver(message)

    assert is_requeued(ending)
    assert slot.result(message).state != FAILURE


def test_a_backend_that_cannot_store_a_retry_does_not_make_it_a_failure(slot: Slot) -> None:
    @slot.task
    def mourn(task_id: str) -> None:
        """An errback."""

    @slot.task(bind=True)
    def again(self: Task, number: int) -> None:
        slot.write(number)
        if not self.request.retries:
            raise self.retry(countdown=0)

    message = message_of(slot, again.s(7).on_error(mourn.s()))
    with Away(slot, RETRY):
        ending = slot.deliver(message)

    assert is_requeued(ending)
    assert slot.result(message).state != FAILURE
    assert [each.task for each in slot.sent()] == ["again"]


def test_an_error_in_on_failure_does_not_bring_the_message_back(slot: Slot) -> None:
    class Broken(Task):
        abstract = True

        def on_failure(self, *_: Any) -> None:
            raise LookupError("on_failure itself")

    @slot.task(base=Broken)
    def fail() -> None:
        raise ValueError

    ending = slot.deliver(message_of(slot, fail.s()))

    assert isinstance(ending, LookupError)
    assert len(slot.dead()) == 1


# ── worker_deduplicate_successful_tasks ──────────────────────────────────────────────────────────


@pytest.fixture
def deduplicating(slot: Slot) -> Slot:
    """A slot whose Celery looks for the result of a message that is redelivered."""
    slot.app.conf.worker_deduplicate_successful_tasks = True
    return slot


def test_the_next_task_of_a_chain_is_published_once_though_celery_deduplicates(
    deduplicating: Slot,
) -> None:
    slot = deduplicating

    @slot.task(trail=False)
    def first() -> int:
        return 1

    @slot.task
    def second(number: int) -> None:
        slot.write(number)

    message = message_of(slot, chain(first.s(), second.s()))
    slot.deliver(message)
    slot.deliver(message, redelivered=True)
    slot.work()

    assert slot.effects() == [1]


def test_a_chord_is_completed_by_a_copy_though_celery_deduplicates(
    deduplicating: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = deduplicating

    @slot.task
    def part() -> int:
        return 3

    @slot.task
    def total(numbers: list[int]) -> None:
        slot.write(sum(numbers))

    message = message_of(slot, chord([part.s()], total.s()))
    with monkeypatch.context() as killed:
        # The worker dies between the result and the part in the chord.
        killed.setattr(slot.app.backend, "on_chord_part_return", lambda *_, **__: None)
        slot.deliver(message)
    slot.deliver(message, redelivered=True)
    slot.work()

    assert slot.effects() == [3]


def test_a_handler_sees_that_its_message_is_redelivered_though_celery_deduplicates(
    deduplicating: Slot,
) -> None:
    slot = deduplicating

    @slot.task(bind=True)
    def seeing(self: Task) -> None:
        slot.write(int(self.request.delivery_info["redelivered"]))

    slot.deliver(message_of(slot, seeing.s()), redelivered=True)

    assert slot.effects() == [1]


def test_a_backend_that_cannot_be_asked_for_an_earlier_result_loses_no_message(
    deduplicating: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = deduplicating

    def away(*_: Any, **__: Any) -> Any:
        raise ConnectionError("the result backend is away")

    @slot.task
    def once(number: int) -> None:
        slot.write(number)

    message = message_of(slot, once.s(7))
    with monkeypatch.context() as outage:
        outage.setattr(slot.app.backend, "get_task_meta", away)
        ending = slot.deliver(message, redelivered=True)

    assert slot.effects() == [7]
    assert ending is None or is_requeued(ending)
