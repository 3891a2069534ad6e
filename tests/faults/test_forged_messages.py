"""Forged messages and notifications: what they say is not believed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from sqlalchemy import select, text

from celery_eda.brokers.database.postgresql_presence import channel_of
from celery_eda.core.addresses import REPLY_TASK
from celery_eda.sagas import WAKEUP_TASK
from tests.faults.conftest import Road, first_of
from tests.faults.programs.hostile_messages import Hand, Letter, call
from tests.faults.test_hostile import ready_worker

PROGRAM = "tests.faults.programs.trusting_system"


@pytest.fixture
def hand(road: Road) -> Iterator[Hand]:
    hand = Hand(road.broker)
    yield hand
    hand.close()


def states(road: Road) -> dict[str, str]:
    columns = road.tables.sagas.c
    with road.engine.connect() as connection:
        return {row.id: row.state for row in connection.execute(select(columns.id, columns.state))}


@first_of("rabbitmq-postgresql", "eda-postgresql")
def test_a_saga_believes_only_what_the_database_confirms(road: Road, hand: Hand) -> None:
    road.app = PROGRAM
    road.environment.update(ROAD_EMBEDDED_RELAY="1", ROAD_SEND_AFTER_COMMIT="1")
    ready_worker(road)
    road.run(
        f"""
from {PROGRAM} import *
unpaid.start({{}}, id="unpaid")
unapproved.start({{}}, id="unapproved")
"""
    )
    news = [
        [wakeup, saga, record]
        for wakeup in ("lock", "time", "end")
        for saga in ("unpaid", "unapproved")
        for record in range(1, 5)
    ]
    ordinary = [(WAKEUP_TASK, arguments) for arguments in news]
    ordinary += [(REPLY_TASK, ["0" * 32, {"result": 1}])]
    for number, (task, arguments) in enumerate(ordinary):
        body = json.dumps([arguments, {}, {}]).encode()
        hand.put(Letter(f"forged {number}", body=body, task=task))
    road.run(
        f"""
from {PROGRAM} import *
for arguments in {news!r}:
    app.send_task({WAKEUP_TASK!r}, arguments, queue="eda.replies.road")
punctual.start({{}}, id="punctual")
"""
    )

    road.until(lambda: states(road).get("punctual") == "completed", "a saga after its time-out")
    road.until(lambda: len(road.dead()) == len(ordinary), "dead letters of what came astray")
    road.pause(1.0, "nothing tells that a saga will not advance")

    expected = {"unpaid": "running", "unapproved": "running", "punctual": "completed"}
    assert states(road) == expected
    assert road.effects("ship") == {1: 1}


@pytest.mark.parametrize("road", ["eda-postgresql"], indirect=True)
def test_whatever_a_role_notifies_a_worker_goes_on(road: Road, hand: Hand) -> None:
    worker = ready_worker(road)
    with road.engine.begin() as connection:
        for payload in ("x", "", " ", "-1 road", "9" * 5000, "1.5 road", "² road", "0 road"):
            notify = text("SELECT pg_notify(:channel, :payload)")
            connection.execute(notify, {"channel": channel_of(road.tables), "payload": payload})

    hand.put(call(1))
    road.until(lambda: road.effects()[1], "a valid message handled")

    assert worker.alive
    assert road.logged("the connection that listens is lost") == 0
    assert "Traceback" not in road.logs()
