"""The fate of a message after its redrive: it begins anew, and what was to follow it follows."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain

from celery_eda import RetryPolicy
from celery_eda.dead_letters import Author
from celery_eda.outbox import join
from tests.support.worker_slot import Slot


def redrive(slot: Slot) -> None:
    """Redrive all letters."""
    for letter in slot.dead():
        with slot.engine.begin() as connection:
            transaction = join(connection, slot.eda.outbox)
            slot.eda.dead_letters.repair.redrive(transaction, letter.id, Author("ada"))
    slot.work()


@pytest.mark.parametrize("how", ["its own", "a policy"])
def test_a_redriven_message_has_all_its_retries_again(slot: Slot, how: str) -> None:
    attempts: list[int] = []

    def fail_three_times() -> None:
        attempts.append(len(attempts))
        if len(attempts) < 4:
            raise ValueError(len(attempts))

    if how == "its own":

        @slot.task(name="unsteady", bind=True, max_retries=1)
        def unsteady(self: Any) -> None:
            try:
                fail_three_times()
            except ValueError as error:
                raise self.retry(countdown=0, exc=error) from error

    else:
        unsteady = slot.task(name="unsteady", policy=RetryPolicy(attempts=2, first=0))(
            fail_three_times
        )

    unsteady.delay()
    slot.work()
    assert [letter.reason for letter in slot.dead()] == ["retries exhausted"]

    redrive(slot)

    assert attempts == [0, 1, 2, 3]
    assert [letter.state for letter in slot.dead()] == ["redriven"]


def test_a_chain_goes_on_when_its_part_is_redriven(slot: Slot) -> None:
    mended: list[bool] = []

    @slot.task(name="part")
    def part(number: int) -> int:
        if not mended:
            raise ValueError("not yet")
        return number

    @slot.task(name="rest")
    def rest(number: int) -> None:
        slot.write(number)

    chain(part.s(2), rest.s()).delay()
    slot.work()
    mended.append(True)

    redrive(slot)

    assert slot.effects() == [2]
