"""The long runs: every fault of the wires in turn, and random faults all over the system."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from tests.faults import test_broker_faults, test_database_faults
from tests.faults.conftest import Road, expect_hits
from tests.support.servers.base import Server
from tests.support.servers.proxy import Proxy
from tests.support.servers.redis import Redis

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

STORM = 120.0  # seconds of faults, one every 4 s
on_both = pytest.mark.parametrize("road", ["rabbitmq-postgresql", "redis-mariadb"], indirect=True)


@on_both
def test_a_wire_to_the_broker_that_does_everything_it_can(road: Road, broker_wire: Proxy) -> None:
    test_broker_faults.endure(road, broker_wire, test_broker_faults.SILENT_FAULTS)


@on_both
def test_a_wire_to_the_database_that_does_everything_it_can(
    road: Road, database_wire: Proxy
) -> None:
    test_database_faults.endure(road, database_wire, test_database_faults.SILENT_FAULTS)


@on_both
def test_a_storm_of_random_faults_loses_and_doubles_nothing(
    road: Road, broker: Server, database: Server, broker_wire: Proxy, database_wire: Proxy
) -> None:
    road.environment["ROAD_MAX_DELIVERIES"] = "1000"  # every fault here takes many workers
    workers = [road.worker(), road.worker("-n", "other@%h")]
    relays = [road.relay(), road.relay()]
    producer = road.producer(1, 100_000)
    everybody = [*workers, *relays, producer]

    def kill_somebody() -> None:
        random.choice(everybody).kill()

    def restart(server: Server) -> None:
        server.kill()
        time.sleep(random.uniform(0, 2))
        server.start()

    def disturb(wire: Proxy, faults: dict[str, Callable[[Proxy], None]]) -> None:
        faults[random.choice(list(faults))](wire)
        time.sleep(random.uniform(0, 3))
        wire.heal()

    def freeze(server: Server) -> None:
        server.freeze()
        time.sleep(random.uniform(0, 3))
        server.thaw()

    faults: list[Callable[[], None]] = [
        kill_somebody,
        kill_somebody,
        lambda: restart(broker),
        lambda: restart(database),
        lambda: freeze(broker),
        lambda: freeze(database),
        lambda: disturb(broker_wire, test_broker_faults.SILENT_FAULTS),
        lambda: disturb(database_wire, test_database_faults.SILENT_FAULTS),
        broker_wire.cut,
        database_wire.cut,
    ]
    end = time.monotonic() + STORM
    struck = 0
    while time.monotonic() < end:
        random.choice(faults)()
        struck += 1
        road.pause(random.uniform(2, 4), "the system gets on")
        for process in everybody:  # what a supervisor does
            if not process.alive:
                process.start()
    producer.kill()

    committed = road.committed()
    expect_hits(struck, f"faults struck {len(committed)} committed orders")
    road.until(
        lambda: len(road.effects()) >= len(committed), "all effects", 60 + len(committed) / 20
    )
    road.settle(5.0)
    assert road.effects() == committed
    assert road.dead() == []


@pytest.mark.parametrize("road", ["redis-sqlite"], indirect=True)
def test_a_worker_outlives_its_redis_every_time(road: Road, redis_server: Redis) -> None:
    worker = road.worker()
    road.relay()
    for round_ in range(10):
        road.place(100 * round_ + 1, 100 * round_ + 90)
        road.until(lambda seen=60 * round_: len(road.effects()) > seen, "a busy worker")  # type: ignore[misc]
        redis_server.kill()
        redis_server.start()
        test_broker_faults.expect_each_effect_once(road)

    expect_hits(10, "times Redis died")
    assert worker.alive
