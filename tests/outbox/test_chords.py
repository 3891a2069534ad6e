"""Each application of a chord is a run of its own, whose body takes effect once."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from celery import chord

from celery_eda.core.message import Message
from celery_eda.outbox import chords, result_backend
from tests.support.worker_slot import Slot


@pytest.fixture
def frozen(slot: Slot) -> Any:
    """A chord with ids of its own, which writes 10."""

    @slot.task
    def add(left: int, right: int) -> int:
        return left + right

    @slot.task
    def total(numbers: list[int]) -> None:
        slot.write(sum(numbers))

    made = chord([add.s(1, 2), add.s(3, 4)], total.s())
    made.freeze()
    return made


def prepare(slot: Slot, messages: list[Message]) -> None:
    """Make the calls that precede *messages*, as a relay does."""
    for each in messages:
        result_backend.run_prerequisites(slot.app, each.prerequisites, each.identity)


def apply(slot: Slot, canvas: Any) -> list[Message]:
    with slot.eda.transaction():
        canvas.apply_async()
    parts = slot.sent()
    prepare(slot, parts)
    return parts


def work(slot: Slot, messages: list[Message]) -> None:
    """Deliver *messages* and what follows from them."""
    while messages:
        for each in messages:
            slot.deliver(each)
        messages = slot.sent()


def test_a_frozen_chord_applied_again_runs_its_body_again(slot: Slot, frozen: Any) -> None:
    for _ in range(3):
        work(slot, apply(slot, frozen))

    assert slot.effects() == [10, 10, 10]


def test_a_frozen_chord_applied_again_outside_a_transaction_runs_its_body_again(
    slot: Slot, frozen: Any
) -> None:
    for _ in range(2):
        frozen.apply_async()
        work(slot, slot.sent())

    assert slot.effects() == [10, 10]


def test_a_run_whose_relay_is_late_does_not_become_the_latest_one_again(
    slot: Slot, frozen: Any
) -> None:
    first = apply(slot, frozen)
    work(slot, first)
    second = apply(slot, frozen)
    prepare(slot, first)
    work(slot, second)

    assert slot.effects() == [10, 10]


def test_the_body_of_a_run_has_one_identity_however_often_it_is_published(
    slot: Slot, frozen: Any
) -> None:
    parts = apply(slot, frozen)
    for each in parts:
        slot.deliver(each)
    (body,) = slot.sent()
    # As if its worker had died after it published the body.
    backend, group_id = slot.app.backend, parts[0].headers["group"]
    backend.set(backend.get_key_for_chord(group_id), 1)
    slot.app.GroupResult(group_id, [slot.result(each) for each in parts]).save()
    slot.deliver(parts[1], redelivered=True)

    assert [each.identity for each in slot.sent()] == [body.identity]


def test_only_the_latest_runs_of_a_chord_are_kept(slot: Slot) -> None:
    group_id, runs = str(uuid4()), [uuid4() for _ in range(chords.MOST_RUNS + 1)]
    for each in runs:
        slot.app.backend.set_chord_size(group_id, 2, run=each)

    known = [chords.is_known(slot.app.backend, group_id, each) for each in runs]
    assert known == [False, *[True] * chords.MOST_RUNS]
