"""Handlers that end in every way that Python allows: no message vanishes, no worker stops."""

from __future__ import annotations

import signal
from collections import Counter

import pytest
from sqlalchemy import select

from tests.faults.conftest import Process, Road

APP = "tests.faults.programs.hostile_errors"
CALLS = ("policy", "retried", "mended", "publishes")


@pytest.fixture
def hostile(road: Road) -> Road:
    """A road whose workers load the hostile handlers, and send what these publish."""
    road.app = APP
    road.environment.update(
        ROAD_EMBEDDED_RELAY="1", ROAD_SEND_AFTER_COMMIT="1", ROAD_MAX_DELIVERIES="2"
    )
    return road


def worker_of(road: Road, pool: str) -> Process:
    green = pool == "gevent"
    road.environment.update(ROAD_ASYNC="01"[not green], ROAD_GREEN="01"[green])
    return road.worker(pool=pool)


def ends(road: Road) -> Counter[tuple[str, str]]:
    return Counter(road.dead())


@pytest.mark.parametrize(
    ("road", "pool"),
    [
        *(("rabbitmq-postgresql", pool) for pool in ("prefork", "threads", "solo", "gevent")),
        ("redis-mariadb", "prefork"),
        ("eda-postgresql", "threads"),
        *(
            pytest.param(*each, marks=pytest.mark.soak)
            for each in (
                ("redis-mariadb", "threads"),
                ("eda-postgresql", "prefork"),
                ("eda-postgresql", "solo"),
                ("eda-postgresql", "gevent"),
                ("eda-sqlite", "solo"),
            )
        ),
    ],
    indirect=["road"],
)
def test_each_way_of_ending_is_a_dead_letter_and_the_worker_goes_on(
    hostile: Road, pool: str
) -> None:
    worker = worker_of(hostile, pool)
    # More than a worker prefetches: were they not acknowledged, nothing else would be handled.
    hostile.run(
        f"""
from {APP} import *
for number, kind in enumerate([*DEADLY, *COUNTED]):
    end.delay(number, kind)
for name in {CALLS!r}:
    app.send_task("hostile." + name)
fail.apply_async((1,), link_error=errback.s())
saga.start({{}}, id="one")
if os.environ["ROAD_ASYNC"] == "1":
    awaits.delay()
else:
    app.send_task("hostile.times-out")
    app.send_task("hostile.limited")
    app.send_task("hostile.killed")
for number in range(9):
    charge.delay(number)
"""
    )
    expected = Counter(
        {
            ("hostile.end", "failed"): 16,
            ("hostile.end", "lost worker"): 2,
            ("hostile.policy", "failed"): 1,
            ("hostile.retried", "retries exhausted"): 1,
            ("hostile.mended", "failed"): 1,
            ("hostile.mended.repair", "failed"): 1,
            ("hostile.publishes", "failed"): 1,
            ("road.fail", "failed"): 1,
        }
    )
    if pool == "gevent":
        expected["hostile.times-out", "failed"] = 1
        expected["hostile.limited", "time limit"] = 1
        expected["hostile.killed", "lost worker"] = 1
    else:
        expected["hostile.awaits", "failed"] = 1

    hostile.until(lambda: ends(hostile) >= expected, f"{expected}")
    hostile.until(lambda: len(hostile.effects()) == 9, "all valid messages")
    hostile.until(lambda: parked_sagas(hostile) == 1, "the saga parked")

    assert ends(hostile) == expected
    assert hostile.effects("end") == hostile.effects("fail") == Counter()
    assert worker.alive
    assert "Unrecoverable" not in hostile.logs()
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0


def parked_sagas(road: Road) -> int:
    table = road.tables.sagas
    with road.engine.connect() as connection:
        states = connection.scalars(select(table.c.state)).all()
    return states.count("parked")
