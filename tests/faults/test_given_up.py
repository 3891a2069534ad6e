"""What RabbitMQ itself gives up becomes a dead letter too, and nothing becomes two."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu import Connection

from tests.faults.conftest import Road

UNDELIVERED = "celery_eda.undelivered.road"


@pytest.fixture
def road(rabbitmq_url: str, postgresql_url: str, tmp_path: Path) -> Iterator[Road]:
    road = Road(rabbitmq_url, postgresql_url, tmp_path)
    road.environment.update(
        ROAD_QUEUE_TYPE="quorum",
        ROAD_MAX_DELIVERIES="1",
        ROAD_SETTINGS=json.dumps({"eda_delivery_limit": 2}),
    )
    yield road
    road.end()


def left_in(road: Road, queue: str) -> int:
    with Connection(road.broker) as connection:
        return int(connection.default_channel.queue_declare(queue, passive=True).message_count)


def test_a_message_that_the_broker_gives_up_becomes_a_dead_letter(road: Road) -> None:
    worker = road.worker(ROAD_MUTATION="redeliveries_are_not_counted")
    road.relay()
    road.run("crash.delay(1, 'kill always')")
    road.place(3, 8)

    road.until(road.dead, "a dead letter")
    road.until(lambda: road.effects() == road.committed(), "the neighbours")

    assert road.dead() == [("road.crash", "lost worker")]
    assert road.effects("crash") == Counter()
    assert worker.alive
    assert left_in(road, "road") == 0


def test_a_message_that_the_worker_has_buried_is_no_second_dead_letter(road: Road) -> None:
    road.worker()
    road.relay()
    road.run("refuse.delay(1, True)")

    road.until(road.dead, "a dead letter")
    road.settle(2.0)

    assert road.dead() == [("road.refuse", "rejected")]
    assert left_in(road, UNDELIVERED) == 0
