"""An event is stored together with its message, or not at all."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from uuid import uuid4

import pytest

from celery_eda.core import context
from celery_eda.core.event import Event, EventAppend
from celery_eda.core.identity import Lane
from celery_eda.errors import VersionConflict
from tests.support.messages import message
from tests.support.worker_slot import Slot


def publish(number: int, expected: int | None = None) -> None:
    """Capture a message with its event, as what emits will."""
    now = datetime(2026, 5, 17, tzinfo=timezone.utc)
    append = EventAppend(Event(uuid4(), "order.placed", "shop", now, number, "7"), expected)
    transaction = context.current_transaction()
    assert transaction is not None
    transaction.capture(
        replace(message("event"), lane=Lane("shop", "order.#", "7"), event_append=append)
    )


def stored(slot: Slot) -> list[tuple[object, int | None]]:
    with slot.engine.connect() as connection:
        events = slot.eda.events.store.stream(connection, "order.7")
        return [(each.data, each.version) for each in events]


def test_an_event_and_its_message_are_committed_together(slot: Slot) -> None:
    with slot.eda.transaction():
        publish(1)
        publish(2)

    assert stored(slot) == [(1, 1), (2, 2)]
    places = [each.position for each in slot.sent()]
    assert [place.number for place in places if place] == [1, 2]


def test_a_transaction_that_rolls_back_leaves_neither(slot: Slot) -> None:
    with slot.eda.transaction() as session:
        publish(1)
        session.rollback()

    assert (stored(slot), slot.waiting()) == ([], [])


def test_a_conflict_of_versions_undoes_the_transaction_with_its_messages(slot: Slot) -> None:
    with pytest.raises(VersionConflict), slot.eda.transaction():
        publish(1, expected=4)

    assert (stored(slot), slot.waiting()) == ([], [])
