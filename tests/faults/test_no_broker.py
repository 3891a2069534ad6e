"""No broker at all: the road where a message waits in the service's own database."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter

import psycopg
import pytest

from tests.faults.conftest import SHORT, Process, Road, expect_hits
from tests.faults.test_worker_deaths import members
from tests.support.servers.postgresql import PostgreSQL

on_both = pytest.mark.parametrize("road", SHORT, indirect=True)
on_postgresql = pytest.mark.parametrize("road", ["eda-postgresql"], indirect=True)
FILL = """
for start in range(0, {number}, 100):
    with eda.transaction():
        for number in range(start, start + 100):
            charge.delay(number)
"""


def expect_all(road: Road, number: int) -> None:
    road.until(lambda: len(road.effects()) >= number, "all effects")
    road.until(lambda: road.queued() == 0, "every message acknowledged")
    road.settle()

    assert road.effects() == Counter(range(number))
    assert road.dead() == []


@on_both
def test_no_relay_is_needed_and_nothing_goes_through_the_outbox(road: Road) -> None:
    road.worker()
    road.place(1, 20)
    road.run("unsteady.delay(1, 2)\nlater.delay(50)\ncharge.apply_async((60,), countdown=1)")

    road.until(lambda: road.effects("unsteady") == Counter([1]), "the third attempt")
    all_of_them = road.committed() + Counter([1, 50, 60])
    road.until(lambda: road.effects().total() >= all_of_them.total(), "what was sent by and by")
    assert road.waiting() == 0
    road.settle()

    assert road.effects() == all_of_them


@on_both
def test_what_a_killed_worker_had_in_its_hands_is_taken_over_soon(road: Road) -> None:
    holder = road.worker("-c1", "-n", "holder@%h")
    road.run("tally.delay(30)\nfor n in range(3): charge.delay(n)")
    road.until(lambda: road.logged("received") == 4, "a worker with its hands full")
    road.worker("-c2", "-n", "heir@%h")
    road.until(lambda: road.logged("ready.") == 2, "another worker")

    assert road.effects() == Counter()
    holder.signal(signal.SIGKILL)  # its child lives on, and sleeps
    struck = time.monotonic()
    road.until(lambda: len(road.effects()) == 3, "the heir's work")
    took = time.monotonic() - struck

    expect_hits(3, f"messages taken over in {took:.2f} s")
    assert road.effects() == Counter(range(3))


def storm(road: Road, number: int, seconds: float) -> None:
    """Kill somebody every second while *number* tasks are worked off."""
    chance = random.Random(number)
    road.environment["ROAD_MAX_DELIVERIES"] = "1000"
    workers = [road.worker("-n", f"worker{n}@%h") for n in range(3)]
    road.run(FILL.format(number=number))
    mains = children = 0
    until = time.monotonic() + seconds
    while len(road.effects()) < number and time.monotonic() < until:
        road.pause(1.0, "between two deaths")
        worker = chance.choice(workers)
        if chance.random() < 0.5:
            worker.signal(signal.SIGKILL)
            worker.wait()
            worker.start()
            mains += 1
        elif pids := [pid for pid in members(worker) if pid != worker.popen.pid]:
            os.kill(chance.choice(pids), signal.SIGKILL)
            children += 1
    expect_hits(mains, "workers killed")
    expect_hits(children, f"of their processes killed, {len(road.effects())} effects by then")
    expect_all(road, number)


@on_both
def test_kills_every_second_lose_and_double_nothing(road: Road) -> None:
    storm(road, 2_000, 20)


@pytest.mark.soak
@pytest.mark.timeout(900)
@on_both
def test_ten_thousand_tasks_outlive_kills_every_second(road: Road) -> None:
    storm(road, 10_000, 300)


def alive(workers: list[Process]) -> bool:
    return all(worker.alive for worker in workers)


@on_postgresql
def test_workers_outlive_their_postgresql_and_nothing_is_lost(
    road: Road, postgresql: PostgreSQL
) -> None:
    workers = [road.worker("-n", f"worker{n}@%h") for n in range(2)]
    road.run(FILL.format(number=1_000))
    for round_ in range(1, 4):
        road.until(lambda seen=200 * round_: len(road.effects()) > seen, "some work")  # type: ignore[misc]
        (postgresql.kill if round_ % 2 else postgresql.stop)()
        road.pause(0.5, "the database is away")
        postgresql.start()

    expect_all(road, 1_000)
    assert alive(workers)


@on_postgresql
def test_workers_outlive_connections_that_are_cut(road: Road, postgresql: PostgreSQL) -> None:
    workers = [road.worker("-n", f"worker{n}@%h") for n in range(2)]
    road.run(FILL.format(number=1_000))
    cut = 0
    url = road.database.replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as operator:
        for seen in range(100, 1_000, 150):
            road.until(lambda seen=seen: len(road.effects()) > seen, "some work")  # type: ignore[misc]
            cut += len(
                operator.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                ).fetchall()
            )

    expect_hits(cut, "connections cut")
    expect_all(road, 1_000)
    assert alive(workers)


@on_postgresql
def test_a_worker_outlives_a_database_that_is_away_for_long(
    road: Road, postgresql: PostgreSQL
) -> None:
    worker = road.worker()
    road.run("slow.delay(1, 3)\ncharge.delay(0)")
    road.until(lambda: road.effects() == Counter([0]), "work")

    postgresql.kill()
    road.pause(8.0, "longer than the task that was running, and than several tries to connect")
    postgresql.start()
    road.run("charge.delay(1)")
    road.until(lambda: road.effects() == Counter([0, 1]), "more work")
    road.until(lambda: road.effects("slow") == Counter([1]), "what was interrupted")
    road.until(lambda: road.queued() == 0, "every message acknowledged")

    assert worker.alive
    assert road.effects("slow") == Counter([1])
