"""Transactions that the database ends because they are idle: the dead letter says so, soon."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from sqlalchemy import select

from tests.faults.conftest import Road

#: Deliveries of a message whose handler stalls every time.
DELIVERIES = 3

on_servers = pytest.mark.parametrize(
    "road", ["rabbitmq-postgresql", "redis-mariadb"], indirect=True
)


def stall(road: Road, call: str, **settings: object) -> None:
    """Have a handler compute for longer than the database lets a transaction be idle."""
    road.worker(ROAD_SETTINGS=json.dumps({"eda_transaction_timeout": 1.0, **settings}))
    road.relay()
    road.run(f"with eda.transaction(): {call}")


@on_servers
def test_a_handler_that_always_stalls_becomes_a_dead_letter_that_names_the_setting(
    road: Road,
) -> None:
    stall(road, "stall.delay(7, 3, True)", eda_outage_patience=0.5)
    road.until(road.dead, "a dead letter")
    road.settle()
    columns = road.tables.dead_letters.c
    with road.engine.connect() as connection:
        letter = connection.execute(select(columns.error_type, columns.error)).one()

    assert road.dead() == [("road.stall", "time limit")]
    assert letter.error_type == "TransactionTimeout"
    assert "eda_transaction_timeout (1 s)" in letter.error
    assert road.logged("was idle too long, and is redelivered") == DELIVERIES
    assert road.effects("stall") == Counter()


@on_servers
def test_a_handler_that_stalls_once_takes_effect_once(road: Road) -> None:
    stall(road, "stall.delay(7, 3)")
    road.until(lambda: road.effects("stall"), "the effect")
    road.settle()

    assert road.effects("stall") == Counter([7])
    assert road.dead() == []
