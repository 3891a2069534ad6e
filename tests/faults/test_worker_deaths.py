"""Workers die and are told to end in every way there is, while they handle messages."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from itertools import count

import psutil
import pytest
from celery import Celery

from tests.faults.conftest import Process, Road

#: How a handler takes its process down, the first time it runs.
WAYS = ("exit", "sys.exit", "segfault", "kill")


def once(numbers: int) -> Counter[int]:
    return Counter(range(1, numbers + 1))


def settings(**options: object) -> dict[str, str]:
    return {"ROAD_SETTINGS": json.dumps(options)}


def expect_an_able_worker(road: Road, worker: Process) -> None:
    """It still handles messages, and has none left in its hands."""
    road.place(1, 2)
    road.until(lambda: road.effects() == road.committed(), "the worker going on")

    assert worker.alive


def test_a_handler_that_takes_its_process_down_takes_effect_once(
    road: Road, record_property: Callable[[str, object], None]
) -> None:
    worker = road.worker()
    road.relay()
    road.place(3, 20)
    started = time.monotonic()
    for number, way in enumerate(WAYS, start=1):
        road.run(f"crash.delay({number}, {way!r})")

    road.until(lambda: len(road.effects("crash")) >= 4, "an effect of each")
    record_property("seconds", round(time.monotonic() - started, 1))
    road.settle()

    assert road.effects("crash") == once(4)
    assert road.effects() == road.committed()
    assert road.dead() == []
    expect_an_able_worker(road, worker)


@pytest.mark.parametrize(
    ("road", "pool", "way"),
    [
        ("rabbitmq-postgresql", "prefork", "kill always"),
        ("redis-mariadb", "prefork", "kill always"),
        ("redis-sqlite", "prefork", "sys.exit always"),
        ("eda-sqlite", "prefork", "kill always"),
        ("eda-postgresql", "threads", "sys.exit always"),
        ("rabbitmq-postgresql", "threads", "sys.exit always"),
        pytest.param("redis-mariadb", "threads", "sys.exit always", marks=pytest.mark.soak),
    ],
    indirect=["road"],
)
def test_a_message_that_ends_its_worker_every_time_becomes_a_dead_letter(
    road: Road, pool: str, way: str
) -> None:
    worker = road.worker(pool=pool, ROAD_MAX_DELIVERIES="2")
    road.relay()
    road.run(f"crash.delay(1, {way!r})")
    road.place(3, 20)

    road.until(road.dead, "a dead letter")
    road.until(lambda: road.effects() == road.committed(), "the neighbours")
    road.settle()

    assert road.dead() == [("road.crash", "lost worker")]
    assert road.effects("crash") == Counter()
    assert road.effects() == road.committed()
    expect_an_able_worker(road, worker)


@pytest.mark.parametrize("road", ["rabbitmq-postgresql"], indirect=True)
def test_a_message_that_ends_its_worker_every_time_becomes_a_dead_letter_of_a_quorum_queue_too(
    road: Road,
) -> None:
    road.environment["ROAD_QUEUE_TYPE"] = "quorum"
    test_a_message_that_ends_its_worker_every_time_becomes_a_dead_letter(
        road, "prefork", "kill always"
    )


@pytest.mark.parametrize("road", ["rabbitmq-postgresql", "redis-mariadb"], indirect=True)
def test_a_handler_that_overruns_its_hard_limit_once_takes_effect_once(road: Road) -> None:
    results = f"db+{road.database}"
    worker = road.worker(ROAD_RESULTS=results)
    road.relay()
    road.run("print(hang.apply_async((1,), task_id='overran'))", ROAD_RESULTS=results)

    road.until(lambda: road.effects("hang"), "the second run")
    road.settle()
    backend = Celery(backend=results)
    road.until(lambda: backend.AsyncResult("overran").ready(), "a result")

    assert road.effects("hang") == once(1)
    assert backend.AsyncResult("overran").result == 1
    assert road.dead() == []
    expect_an_able_worker(road, worker)


@pytest.mark.parametrize("road", ["rabbitmq-postgresql"], indirect=True)
def test_a_handler_that_always_overruns_its_hard_limit_becomes_a_dead_letter(road: Road) -> None:
    worker = road.worker(ROAD_MAX_DELIVERIES="1")
    road.relay()
    road.run("slow.apply_async((1, 600), time_limit=1)")

    road.until(road.dead, "a dead letter")

    assert road.dead() == [("road.slow", "time limit")]
    assert road.effects("slow") == Counter()
    expect_an_able_worker(road, worker)


@pytest.mark.parametrize("road", ["redis-mariadb"], indirect=True)
def test_a_soft_limit_is_a_failure_unless_the_handler_sees_to_it(road: Road) -> None:
    worker = road.worker()
    road.relay()
    road.run("slow.apply_async((1, 600), soft_time_limit=1)")
    road.run("patient.apply_async((1, 600), soft_time_limit=1)")

    road.until(road.dead, "a dead letter")
    road.until(lambda: road.effects("patient"), "the effect of the other one")

    assert road.dead() == [("road.slow", "failed")]
    assert road.effects("slow") == Counter()
    assert road.effects("patient") == once(1)
    expect_an_able_worker(road, worker)


@pytest.mark.parametrize("road", ["redis-sqlite"], indirect=True)
def test_recycled_processes_take_nothing_with_them(road: Road) -> None:
    worker = road.worker("--max-tasks-per-child", "1")
    road.relay()
    road.place(3, 20)

    road.until(lambda: len(road.effects()) >= len(road.committed()), "all effects")
    road.settle()

    assert road.effects() == road.committed()
    expect_an_able_worker(road, worker)


#: How a worker is told to end, and its settings.
ENDS = {
    "warm": (signal.SIGTERM, {}),
    "cold": (signal.SIGQUIT, {}),
    "soft": (signal.SIGQUIT, {"worker_soft_shutdown_timeout": 1.0}),
    "killed": (signal.SIGKILL, {}),
}


@pytest.mark.parametrize(
    ("road", "pool"),
    [
        ("rabbitmq-postgresql", "prefork"),
        pytest.param("rabbitmq-postgresql", "threads", marks=pytest.mark.soak),
        pytest.param("redis-mariadb", "prefork", marks=pytest.mark.soak),
        pytest.param("eda-sqlite", "prefork", marks=pytest.mark.soak),
        ("eda-postgresql", "threads"),
    ],
    indirect=["road"],
)
def test_workers_that_end_while_their_tasks_run_leave_nothing_half_done(
    road: Road, pool: str
) -> None:
    tasks = 40
    road.environment["ROAD_EMBEDDED_RELAY"] = "1"
    road.run(f"for n in range(1, {tasks + 1}): slow.delay(n, 0.3)")

    for how, (number, options) in ENDS.items():
        before = len(road.effects("slow"))
        worker = road.worker(pool=pool, **settings(**options))
        road.until(lambda before=before: len(road.effects("slow")) > before, f"work before {how}")
        worker.signal(number)
        worker.wait()
        road.until(lambda worker=worker: not members(worker), "the end of what it started")
    road.worker(pool=pool)
    road.until(lambda: len(road.effects("slow")) >= tasks, "all effects")
    road.settle(3.0)

    assert road.effects("slow") == once(tasks)
    assert road.dead() == []


def members(worker: Process) -> list[int]:
    """The processes that *worker* started and that are still there."""
    return [
        each.pid
        for each in psutil.process_iter()
        if _session(each.pid) == worker.popen.pid and each.status() != psutil.STATUS_ZOMBIE
    ]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_random_deaths_of_workers_cost_nothing(road: Road) -> None:
    chance = random.Random(1)
    worker = road.worker(ROAD_MAX_DELIVERIES="100")
    road.relay()
    orders = count(1, step=200)
    producer = road.producer(first := next(orders), first + 199)
    until, deaths = time.monotonic() + 150, 0

    while time.monotonic() < until:
        road.pause(chance.uniform(0.2, 1.5), "between two deaths")
        if not producer.alive:
            producer = road.producer(first := next(orders), first + 199)
        if chance.random() < 0.2:
            worker.signal(signal.SIGKILL)
            worker.wait()
            worker.start()
        elif children := [pid for pid in members(worker) if pid != worker.popen.pid]:
            os.kill(chance.choice(children), signal.SIGKILL)
            deaths += 1
    producer.wait()
    road.until(lambda: len(road.effects()) >= len(road.committed()), "all effects", 120)
    road.settle(5.0)

    assert deaths > 20
    assert road.effects() == road.committed()
    assert road.dead() == []
