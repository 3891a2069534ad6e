"""Delays by one clock, that of the database, whatever the clocks of producer and worker say."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest
from sqlalchemy import func, select, update

from tests.faults.conftest import SHORT, Road

on_each_broker = pytest.mark.parametrize(
    "road",
    ["rabbitmq-postgresql", pytest.param("redis-mariadb", marks=pytest.mark.soak), *SHORT],
    indirect=True,
)

PUBLISH = """
from datetime import datetime, timedelta, timezone

with eda.transaction():
    charge.apply_async((1,), countdown=3600)
    charge.apply_async((2,), eta=datetime.now(timezone.utc) + timedelta(hours=1))
    note.apply_async((3,), countdown=3600)
"""
PUBLISH_OUTSIDE = """
note.apply_async((4,), countdown=3600)
"""


def delayed(road: Road) -> int:
    """Number of messages that wait until they are due."""
    with road.engine.connect() as connection:
        return sum(
            connection.execute(select(func.count()).where(due.is_not(None))).scalar_one()
            for due in (road.tables.outbox.c.available_at, road.tables.queue.c.due)
        )


def come_due(road: Road) -> None:
    """Let an hour pass by the clock of the database, and by no other."""
    past = datetime(2000, 1, 1, tzinfo=timezone.utc)
    with road.engine.begin() as connection:
        for due in (road.tables.outbox.c.available_at, road.tables.queue.c.due):
            connection.execute(update(due.table).where(due.is_not(None)).values({due.name: past}))


@on_each_broker
def test_a_delay_that_is_over_by_the_databases_clock_is_over_at_the_worker(road: Road) -> None:
    notes = {3: 1}
    road.run(PUBLISH)
    if road.broker.startswith("eda+"):  # the broker keeps it, since it is the database
        road.run(PUBLISH_OUTSIDE, ROAD_SETTINGS='{"eda_outside": "send"}')
        notes[4] = 1
    assert delayed(road) == 2 + len(notes)
    come_due(road)
    road.relay()
    road.worker()

    road.until(lambda: road.effects() == {1: 1, 2: 1}, "the calls of a reliable task")
    road.until(lambda: road.effects("note") == notes, "the calls of a plain task")
