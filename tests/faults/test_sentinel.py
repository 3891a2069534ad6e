"""Redis behind Sentinel: workers are killed, the master dies or freezes, and a replica follows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_eda.brokers.base import CONFIRMED, Transport, Verdict
from tests.faults.conftest import Road, expect_hits
from tests.support.letters import letters
from tests.support.servers.redis import Redis
from tests.support.servers.sentinel import MASTER, Sentinel

ORDERS = 180
#: Time to recover on a busy machine: a failover, reconnecting, redeliveries.
HEALING = 240.0
OPTIONS = {
    "master_name": MASTER,
    "visibility_timeout": 2,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
    "socket_timeout": 5,
}


@pytest.fixture
def road(sentinel: Sentinel, postgresql_url: str, tmp_path: Path) -> Iterator[Road]:
    """A system whose broker is the master that the sentinel names."""
    road = Road(sentinel.broker_url, postgresql_url, tmp_path)
    road.environment["ROAD_SETTINGS"] = json.dumps({"broker_transport_options": OPTIONS})
    road.until(lambda: sentinel.is_replicated, "the replica")
    yield road
    road.end()


def expect_each_effect_once(road: Road) -> None:
    road.until(lambda: len(road.effects()) >= len(road.committed()), "all effects", HEALING)
    road.settle(3.0)

    assert road.effects() == road.committed()
    assert road.dead() == []


def test_killed_workers_lose_double_and_strand_nothing(road: Road) -> None:
    worker = road.worker()
    road.relay()
    for round_ in range(6):
        road.place(100 * round_ + 1, 100 * round_ + 40)
        target = len(road.effects()) + 3
        road.until(lambda least=target: len(road.effects()) >= least, "effects of this round")  # type: ignore[misc]
        worker.kill()
        worker.start()
    expect_hits(len(road.committed()) - len(road.effects()), "messages under way at the last kill")

    expect_each_effect_once(road)


def kill(road: Road, master: Redis) -> None:
    master.kill()


def freeze(road: Road, master: Redis) -> None:
    master.freeze()


@pytest.mark.parametrize("fault", [kill, freeze])
def test_a_failover_under_load_loses_doubles_and_strands_nothing(
    road: Road, sentinel: Sentinel, fault: Callable[[Road, Redis], None]
) -> None:
    road.place(1, ORDERS)
    road.worker()
    road.relay()
    road.relay()
    producer = road.producer(ORDERS + 1, 2 * ORDERS, ROAD_SEND_AFTER_COMMIT="1")
    road.until(lambda: len(road.effects()) >= 5, "first effects")
    before = sentinel.master
    expect_hits(len(road.committed()) - len(road.effects()), "messages under way at the fault")

    fault(road, before)
    road.until(lambda: sentinel.master is not before, "another master", HEALING)
    before.start()  # it comes back, for a moment as a second master
    assert producer.wait() == 0, road.logs()

    expect_each_effect_once(road)


ASK = """
print(quote.ask(1).get(timeout=100))
assert quote.ask(2).get(timeout=100) == 4
"""


def test_requests_are_replied_to_before_and_after_a_failover(
    road: Road, sentinel: Sentinel
) -> None:
    road.worker(ROAD_SEND_AFTER_COMMIT="1")
    road.relay()
    road.run(ASK)
    before = sentinel.master

    before.kill()
    road.until(lambda: sentinel.master is not before, "another master", HEALING)

    road.run(ASK)


@pytest.fixture
def transport(sentinel: Sentinel, transport_to: Callable[..., Transport]) -> Transport:
    deadline = time.monotonic() + HEALING
    while not sentinel.is_replicated:
        assert time.monotonic() < deadline, "no replica"
    return transport_to(
        sentinel.broker_url, timeout=4, broker_transport_options={"master_name": MASTER}
    )


def replica_of(sentinel: Sentinel) -> Redis:
    return next(each for each in sentinel.nodes if each is not sentinel.master)


def test_a_message_that_no_replica_has_is_not_confirmed(
    sentinel: Sentinel, transport: Transport
) -> None:
    assert transport.publish(letters(1)) == [CONFIRMED]
    replica_of(sentinel).freeze()

    assert [each.verdict for each in transport.publish(letters(3))] == [Verdict.unknown] * 3


def test_without_a_replica_the_master_alone_confirms_with_a_warning(
    sentinel: Sentinel, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    replica_of(sentinel).kill()
    deadline = time.monotonic() + HEALING
    results: list[Any] = []
    while results != [CONFIRMED]:
        assert time.monotonic() < deadline, results
        results = transport.publish(letters(1))

    assert "no replica is connected to the Redis master" in caplog.text
