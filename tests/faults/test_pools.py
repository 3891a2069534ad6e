"""Every kind of pool, with a relay beside it: the same work, the same promise."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter

import pytest
from sqlalchemy import select, text

from tests.faults.conftest import Process, Road
from tests.faults.programs.tables import effects
from tests.faults.test_worker_deaths import members
from tests.support.servers.base import Server
from tests.support.servers.proxy import Proxy
from tests.support.servers.redis import Redis


@pytest.fixture
def alone(road: Road) -> Road:
    """A road without relays of their own: workers and producers send."""
    road.environment.update(ROAD_EMBEDDED_RELAY="1", ROAD_SEND_AFTER_COMMIT="1")
    return road


def worker_of(road: Road, pool: str) -> Process:
    return road.worker(pool=pool, ROAD_ASYNC="0" if pool == "gevent" else "1")


def expect_refusal(road: Road, worker: Process, *words: str) -> None:
    assert worker.wait() != 0
    assert all(each in road.logs() for each in words), road.logs()


@pytest.mark.parametrize(
    ("road", "pool"),
    [
        *(("rabbitmq-postgresql", pool) for pool in ("prefork", "threads", "solo", "gevent")),
        ("redis-mariadb", "prefork"),
        pytest.param("redis-mariadb", "gevent", marks=pytest.mark.soak),
        pytest.param("redis-sqlite", "prefork", marks=pytest.mark.soak),
        ("redis-sqlite", "threads"),
        *(("eda-sqlite", pool) for pool in ("prefork", "threads", "solo")),
        *(("eda-postgresql", pool) for pool in ("prefork", "threads", "solo", "gevent")),
    ],
    indirect=["road"],
)
def test_every_pool_handles_the_same_work_once(alone: Road, pool: str) -> None:
    worker = worker_of(alone, pool)
    alone.place(1, 12)
    alone.run(
        """
for n in (13, 14):
    legacy.delay(n)
    flaky.delay(100 + n)
    fail.delay(n)
    refuse.delay(n)
with eda.transaction():
    (add.s(1, 2) | add.s(3)).delay()
"""
    )
    if pool != "gevent":
        alone.run("later.delay(15)")
    charges = [n for n in range(1, 13) if n % 3] + [13, 14, 113, 114]
    charges += [15] if pool != "gevent" else []

    alone.until(lambda: len(alone.effects()) >= len(charges), "all charges")
    alone.until(lambda: len(alone.effects("refuse")) >= 2, "what was refused once")
    alone.until(lambda: len(alone.effects("add")) >= 2, "a chain")
    alone.until(lambda: len(alone.dead()) >= 2, "the failures")
    alone.settle(3.0)

    assert alone.effects() == Counter(charges)
    assert alone.effects("legacy") == alone.effects("refuse") == Counter([13, 14])
    assert alone.effects("flaky") == Counter([113, 114])
    assert alone.effects("add") == Counter([1, 3])
    assert alone.effects("fail") == Counter()
    assert alone.dead() == [("road.fail", "failed")] * 2
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert members(worker) == []


@pytest.mark.parametrize("road", ["redis-sqlite"], indirect=True)
def test_greenlets_are_refused_on_sqlite(road: Road) -> None:
    worker = road.worker(pool="gevent", ROAD_ASYNC="0")

    expect_refusal(road, worker, "gevent", "write lock")


@pytest.mark.parametrize("road", ["rabbitmq-postgresql"], indirect=True)
def test_greenlets_are_refused_for_async_handlers(road: Road) -> None:
    worker = road.worker(pool="gevent", ROAD_ASYNC="1")

    expect_refusal(road, worker, "road.later", "async def")


@pytest.mark.parametrize("road", ["redis-sqlite"], indirect=True)
def test_a_worker_without_tables_names_the_command_that_makes_them(road: Road) -> None:
    road.tables.metadata.drop_all(road.engine)
    worker = road.worker()

    expect_refusal(road, worker, "eda db upgrade")


@pytest.mark.parametrize("road", ["redis-sqlite"], indirect=True)
def test_a_relay_beside_the_worker_is_replaced_when_it_is_killed(alone: Road) -> None:
    worker = alone.worker()
    alone.environment["ROAD_SEND_AFTER_COMMIT"] = "0"
    alone.place(1, 2)
    alone.until(lambda: alone.effects() == alone.committed(), "work")

    os.kill(relays(worker)[-1], signal.SIGKILL)
    alone.until(lambda: len(relays(worker)) == 2, "another relay")
    alone.place(3, 20)
    alone.until(lambda: alone.effects() == alone.committed(), "more work")

    assert set(relays(worker)) & set(members(worker)) == {relays(worker)[-1]}


@pytest.mark.parametrize(
    ("road", "pool"),
    [("rabbitmq-postgresql", "prefork"), ("redis-mariadb", "threads")],
    indirect=["road"],
)
def test_a_relay_beside_the_worker_outlives_the_broker(
    alone: Road, pool: str, request: pytest.FixtureRequest
) -> None:
    name = "redis_server" if alone.broker.startswith("redis") else "rabbitmq"
    broker: Server = request.getfixturevalue(name)
    worker = alone.worker(pool=pool)
    alone.environment["ROAD_SEND_AFTER_COMMIT"] = "0"
    alone.place(1, 8)
    alone.until(lambda: alone.effects() == alone.committed(), "work")

    broker.kill()
    alone.place(9, 20)
    broker.start()
    alone.until(lambda: alone.effects() == alone.committed(), "the rest")
    alone.settle(3.0)

    assert alone.effects() == alone.committed()
    assert worker.alive


def relays(worker: Process) -> list[int]:
    """The relays that *worker* has started, as it says."""
    log = worker.log.read_text(errors="replace")
    return [int(each) for each in re.findall(r"a relay runs beside .* process (\d+)", log)]


@pytest.mark.parametrize("road", ["rabbitmq-postgresql", "redis-mariadb"], indirect=True)
def test_no_connection_is_shared_by_two_processes(alone: Road) -> None:
    worker = alone.worker("--max-tasks-per-child", "5")
    alone.until(lambda: relays(worker), "a worker")
    mains = connections(alone)

    alone.run("for n in range(24): where.delay()")
    alone.until(lambda: len(places(alone)) >= 24, "all effects")

    used = set(places(alone))
    by_process = Counter(connection for _, connection in used)
    assert len({process for process, _ in used}) >= 3
    assert set(by_process.values()) == {1}
    assert not mains & set(by_process)


def places(road: Road) -> list[tuple[str, int]]:
    """Process and connection of each call of ``where``."""
    where = effects.c.name.startswith("process ")
    with road.engine.connect() as connection:
        rows = connection.execute(select(effects.c.name, effects.c.number).where(where))
        return [(row.name, row.number) for row in rows]


def connections(road: Road) -> set[int]:
    """The connections to the database of *road*, but for that of this question."""
    query = {
        "postgresql": "SELECT pid FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()",
        "mysql": "SELECT id FROM information_schema.processlist"
        " WHERE db = database() AND id <> connection_id()",
    }[road.engine.name]
    with road.engine.connect() as connection:
        return set(connection.scalars(text(query)))


@pytest.mark.parametrize("road", ["redis-mariadb"], indirect=True)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_on_redis_a_worker_hears_at_once_of_a_message_in_any_of_its_queues(
    road: Road, pool: str
) -> None:
    road.worker("-Q", "road,second,third", pool=pool, ROAD_GLANCE="120")
    road.relay()

    for number, queue in enumerate(("road", "third", "second", "third", "road")):
        road.run(f"with eda.transaction(): charge.apply_async(({number},), queue={queue!r})")
        road.until(lambda number=number: road.effects()[number], "the message", 30.0)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("road", "pool"),
    [("rabbitmq-postgresql", pool) for pool in ("prefork", "threads", "solo")],
    indirect=["road"],
)
def test_every_pool_gives_a_message_back_while_celery_cannot_store_that_it_has_started(
    road: Road, pool: str, redis_server: Redis
) -> None:
    settings = {"task_track_started": True, "redis_socket_connect_timeout": 1}
    with Proxy(redis_server.port) as results:
        results.refuse()
        worker = road.worker(
            pool=pool,
            ROAD_RESULTS=results.through(redis_server.database(206)),
            ROAD_SETTINGS=json.dumps(settings),
        )
        road.relay()
        road.place(1, 4)
        road.until(lambda: road.logged("Celery has not called the task"), "a message given back")
        before = road.effects()
        results.accept()
        road.until(lambda: road.effects() == road.committed(), "all effects")
        road.settle()

        assert before == Counter()
        assert road.effects() == road.committed()
        assert road.dead() == []
        assert worker.alive
