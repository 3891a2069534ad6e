"""One node of a RabbitMQ cluster is down, and with it the classic queues that live there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Queue

from tests.faults.conftest import Road
from tests.support.servers.rabbitmq import RabbitMQ

#: Time for a killed node to come back on a busy machine, and for its queues to recover.
HEALING = 240.0


@pytest.fixture(scope="module")
def pair(servers_folder: Path) -> Iterator[tuple[RabbitMQ, RabbitMQ]]:
    with RabbitMQ.pair(servers_folder) as nodes:
        yield nodes


@pytest.fixture
def road(pair: tuple[RabbitMQ, RabbitMQ], postgresql_url: str, tmp_path: Path) -> Iterator[Road]:
    """A system that is connected to the first node."""
    first, second = pair
    second.start()
    url = first.vhost(tmp_path.name)
    road = Road(url, postgresql_url, tmp_path)
    road.environment["ROAD_SETTINGS"] = settings()
    yield road
    road.end()
    second.start()
    first.drop(tmp_path.name)


def settings(**more: Any) -> str:
    return json.dumps({"eda_retry_delay_max": 0.2, "eda_max_attempts": 3, **more})


def declare_on(node: RabbitMQ, road: Road, name: str) -> None:
    """Declare a queue, as Celery would, that lives on *node*."""
    with Connection(f"{node.url.rstrip('/')}/{road.broker.rpartition('/')[2]}") as connection:
        Queue(name, exchange=name, routing_key=name)(connection.default_channel).declare()


SEND_ASIDE = """
with eda.transaction():
    for number in range(1, 6):
        charge.apply_async((number,), queue="aside")
"""


def test_messages_to_a_queue_whose_node_is_down_wait_and_are_charged_nothing(
    road: Road, pair: tuple[RabbitMQ, RabbitMQ]
) -> None:
    _, second = pair
    declare_on(second, road, "aside")
    second.kill()
    road.run(SEND_ASIDE)
    road.relay()
    road.worker()

    road.until(lambda: road.logged("queues that are down") >= 2, "messages that wait")
    road.place(100, 130)
    road.until(lambda: road.effects() == road.committed(), "the others to flow")

    assert road.waiting() == 5
    assert road.dead() == []
    assert "home node" in (road.last_error() or "")

    second.start()
    road.worker("-Q", "aside", "-n", "aside@%h")
    road.until(lambda: all(road.effects()[each] for each in range(1, 6)), "those too", HEALING)


ASK = "print(eda.request(quote, (1,), address='durable').get(timeout=200))"


def test_a_worker_starts_without_an_own_queue_whose_node_is_down_and_consumes_it_later(
    road: Road, pair: tuple[RabbitMQ, RabbitMQ]
) -> None:
    _, second = pair
    declare_on(second, road, "eda.replies.road")
    second.kill()
    worker = road.worker()
    road.relay()
    road.place(1, 30)

    road.until(lambda: road.effects() == road.committed(), "effects in the meantime")
    road.until(lambda: road.logged("eda.replies.road is not consumed for now"), "a warning")
    assert worker.alive

    second.start()
    road.run(ASK, patience=HEALING)
