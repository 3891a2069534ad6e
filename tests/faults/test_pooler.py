"""The road with pgbouncer, in transaction mode, before its PostgreSQL."""

from __future__ import annotations

import json
import signal
from collections import Counter

import pytest
from sqlalchemy.exc import OperationalError

from tests.faults.conftest import Road, expect_hits
from tests.faults.test_no_broker import FILL, expect_all
from tests.support.servers.pgbouncer import PgBouncer
from tests.support.servers.postgresql import PostgreSQL

#: Seconds after which a silent worker counts as dead.
HEARTBEAT = 2.0
on_pgbouncer = pytest.mark.parametrize("road", ["eda-pgbouncer"], indirect=True)


@pytest.fixture(autouse=True)
def beating(road: Road) -> None:
    if road.broker.startswith("eda"):
        options = {"broker_transport_options": {"heartbeat": HEARTBEAT}}
        road.environment["ROAD_SETTINGS"] = json.dumps(options)
    road.environment["ROAD_MAX_DELIVERIES"] = "1000"


@pytest.mark.parametrize("road", ["rabbitmq-pgbouncer"], indirect=True)
def test_killed_relays_and_workers_lose_and_double_nothing(
    road: Road, pgbouncer: PgBouncer
) -> None:
    worker, relay = road.worker(), road.relay()
    placed = road.producer(1, 300)
    for _ in range(2):
        for process in (worker, relay):
            before = len(road.effects())
            road.until(lambda before=before: len(road.effects()) > before + 10, "some work")  # type: ignore[misc]
            process.kill()
            process.start()
    assert placed.wait() == 0, road.logs()
    pgbouncer.kill()
    pgbouncer.start()

    road.until(lambda: road.effects() == road.committed(), "every effect")
    road.settle()
    assert road.effects() == road.committed()
    assert road.dead() == []


@on_pgbouncer
def test_what_a_killed_worker_held_is_taken_over_when_its_time_is_over(road: Road) -> None:
    holder = road.worker("-c1", "-n", "holder@%h")
    road.run("tally.delay(30)\nfor n in range(3): charge.delay(n)")
    road.until(lambda: road.logged("received") == 4, "a worker with its hands full")
    road.worker("-c2", "-n", "heir@%h")
    road.until(lambda: road.logged("ready.") == 2, "another worker")
    assert road.effects() == Counter()

    holder.signal(signal.SIGKILL)

    road.until(lambda: len(road.effects()) == 3, "the heir's work")
    assert road.effects() == Counter(range(3))


@on_pgbouncer
def test_a_frozen_worker_that_wakes_finds_itself_buried_and_doubles_nothing(road: Road) -> None:
    frozen = road.worker("-c1", "-n", "frozen@%h")
    road.until(lambda: road.logged("ready.") == 1, "a worker")
    road.run("tally.delay(2)\nfor n in range(3): charge.delay(n)")
    road.until(lambda: road.logged("received") == 4, "a worker with its hands full")
    frozen.signal(signal.SIGSTOP)
    road.worker("-c2", "-n", "heir@%h")
    road.until(lambda: len(road.effects()) == 3, "the heir's work")

    frozen.signal(signal.SIGCONT)

    road.until(
        lambda: road.logged("reclaimed the messages of taker") > 0,
        "it to learn that it counts as dead",
    )
    road.run("for n in range(3, 50): charge.delay(n)")
    expect_all(road, 50)
    assert road.effects("tally") == Counter([0])
    assert frozen.alive


def answers(road: Road) -> bool:
    try:
        road.committed()
    except OperationalError:
        return False
    return True


@on_pgbouncer
def test_workers_outlive_the_pooler_and_the_server(
    road: Road, pgbouncer: PgBouncer, postgresql: PostgreSQL
) -> None:
    workers = [road.worker("-n", f"worker{n}@%h") for n in range(2)]
    road.run(FILL.format(number=1_000))
    struck = 0
    for server in (pgbouncer, postgresql, pgbouncer):
        before = len(road.effects())
        road.until(lambda before=before: len(road.effects()) > before + 50, "some work")  # type: ignore[misc]
        server.kill()
        road.pause(0.5, "it is away")
        server.start()
        road.until(lambda: answers(road), "the pooler to find its server again")
        struck += 1

    expect_all(road, 1_000)
    expect_hits(struck, "poolers and servers killed")
    assert all(worker.alive for worker in workers)
