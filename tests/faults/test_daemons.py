"""Workers as daemons of ``celery multi``, and the scheduler ``celery beat``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import Process, Road
from tests.support import PROJECT
from tests.support.servers.base import Server


@pytest.fixture
def road(rabbitmq_url: str, postgresql_url: str, tmp_path: Path) -> Iterator[Road]:
    road = Road(rabbitmq_url, postgresql_url, tmp_path)
    yield road
    road.end()


# ── celery multi ────────────────────────────────────────────────────────────────────────────────


def multi(road: Road, command: str) -> None:
    """``celery multi`` for one worker; its processes belong to nobody here."""
    words = [sys.executable, "-m", "celery", "-A", road.app, "multi", command, "daemon"]
    places = [f"--pidfile={road.folder}/%n.pid", f"--logfile={road.folder}/%n.log"]
    environment = {**road.environment, "ROAD_EMBEDDED_RELAY": "1"}
    subprocess.run(
        [*words, *places, "-c1", "-l", "INFO"],
        check=True,
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        timeout=150,
    )


def daemons(road: Road) -> list[psutil.Process]:
    """The processes of the worker, its relay among them."""
    mark = str(road.folder)
    return [
        each
        for each in psutil.process_iter(["cmdline"])
        if mark in " ".join(each.info["cmdline"] or ())
    ]


def test_a_worker_that_is_a_daemon_has_a_relay_that_ends_with_it(road: Road) -> None:
    multi(road, "start")
    try:
        road.place(1, 6)
        road.until(lambda: road.effects() == road.committed(), "all effects, by its own relay")
        assert len(daemons(road)) >= 3
    finally:
        multi(road, "stopwait")

    road.until(lambda: not daemons(road), "the end of all its processes")
    assert road.effects().total() == 4


# ── celery beat ─────────────────────────────────────────────────────────────────────────────────

SCHEDULE = {
    "reliable": {"task": "road.charge", "schedule": 1.0, "args": [1]},
    "plain": {"task": "legacy.other", "schedule": 1.0},
}


def beat(road: Road) -> Process:
    road.environment["ROAD_SETTINGS"] = json.dumps(
        {"beat_schedule": SCHEDULE, "beat_max_loop_interval": 1, "broker_connection_timeout": 1}
    )
    schedule = ["-s", str(road.folder / "schedule"), "--pidfile", str(road.folder / "beat.pid")]
    return road._run(["celery", "-A", road.app, "beat", "-l", "INFO", *schedule], None)


def test_what_beat_sends_takes_effect(road: Road) -> None:
    road.worker(ROAD_EMBEDDED_RELAY="1")
    process = beat(road)
    road.until(lambda: road.effects()[1] >= 2, "two effects")

    process.signal(signal.SIGTERM)

    assert process.wait() == 0


def test_while_the_broker_is_away_beat_stores_calls_of_reliable_tasks(
    road: Road, rabbitmq: Server
) -> None:
    process = beat(road)
    road.until(lambda: road.waiting() >= 1, "a stored call")
    rabbitmq.stop()
    before = road.waiting()
    road.until(lambda: road.waiting() >= before + 3, "calls stored during the outage")
    rabbitmq.start()
    road.worker(ROAD_EMBEDDED_RELAY="1")
    road.until(lambda: road.effects()[1] >= before + 3, "their effects")

    process.signal(signal.SIGTERM)

    assert process.wait() == 0
