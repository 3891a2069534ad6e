"""Nobody waits for the result of a call in the transaction that holds it: it would never come."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from celery import chain, chord, group
from celery.result import allow_join_result
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from celery_eda.errors import UncommittedCall
from tests.support.worker_slot import Slot

BLOCKS = ["transaction", "attached session that only read"]
CANVAS = {
    "task": lambda add: add.s(1, 2),
    "chain": lambda add: chain(add.s(1, 2), add.s(3)),
    "group": lambda add: group(add.s(1, 2), add.s(3, 4)),
    "generated group": lambda add: chain(add.s(1, 2), group(add.s(n) for n in range(2))),
    "chord": lambda add: chord([add.s(1, 2)], add.si(3, 4)),
}


@pytest.fixture
def add(slot: Slot) -> Any:
    @slot.task
    def add(left: int, right: int) -> int:
        return left + right

    return add


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest, slot: Slot) -> Callable[[], AbstractContextManager[Any]]:
    if request.param == "transaction":
        return slot.eda.transaction
    sessions = sessionmaker(slot.engine)
    slot.eda.attach(sessions)

    def reading() -> Session:
        session = sessions()
        session.execute(text("SELECT 1"))
        return session

    return reading


@pytest.mark.timeout(60)
@pytest.mark.parametrize("canvas", CANVAS)
def test_waiting_for_a_held_call_is_refused_at_once(
    add: Any, block: Callable[[], AbstractContextManager[Any]], canvas: str
) -> None:
    with block():
        result = CANVAS[canvas](add).apply_async()
        with pytest.raises(UncommittedCall, match=r"after the end of the transaction"):
            result.get()


@pytest.mark.timeout(60)
def test_waiting_is_refused_after_a_savepoint_has_written_the_call(slot: Slot, add: Any) -> None:
    with slot.engine.begin() as connection, slot.eda.transaction(connection):
        result = add.delay(1, 2)
        with connection.begin_nested(), pytest.raises(UncommittedCall):
            result.get()


@pytest.mark.timeout(60)
def test_waiting_in_a_handler_for_a_call_of_its_own_is_refused(slot: Slot, add: Any) -> None:
    refused = []

    @slot.task
    def impatient() -> None:
        with allow_join_result(), pytest.raises(UncommittedCall) as raised:
            add.delay(1, 2).get()
        refused.append(raised.value)

    impatient.delay()
    (message,) = slot.sent()

    assert slot.deliver(message) is None
    assert len(refused) == 1


@pytest.mark.timeout(60)
def test_results_of_calls_that_have_left_can_be_awaited(slot: Slot, add: Any) -> None:
    before = add.delay(1, 2)
    slot.work()
    with slot.eda.transaction():
        add.delay(3, 4)

        assert before.get(timeout=30) == 3


def test_a_set_of_results_is_awaited_as_its_results_are(slot: Slot, add: Any) -> None:
    with slot.eda.transaction():
        results = slot.app.ResultSet([add.delay(1, 2)])
        with pytest.raises(UncommittedCall):
            results.join_native(timeout=1)


@pytest.mark.timeout(60)
def test_a_result_can_be_awaited_after_the_commit(slot: Slot, add: Any) -> None:
    with slot.eda.transaction():
        result = add.delay(1, 2)
    slot.work()

    assert result.get(timeout=30) == 3
