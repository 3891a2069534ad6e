"""Two services on one broker, with a database each: neither takes what belongs to the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Process, Road

Made = Callable[..., Road]


@pytest.fixture(params=["rabbitmq_url", "redis_url"])
def broker_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(request.param)
    return url


@pytest.fixture
def make_road(broker_url: str, tmp_path: Path) -> Iterator[Made]:
    """Makes a system with a database of its own, on the same broker as the others."""
    roads: list[Road] = []

    def make(name: str, database: str | None = None) -> Road:
        folder = tmp_path / str(len(roads))
        folder.mkdir()
        road = Road(broker_url, database or f"sqlite:///{folder / 'road.db'}", folder)
        road.app = "tests.faults.programs.repair_system"
        road.environment |= {
            "ROAD_SETTINGS": json.dumps({"eda_service": name}),
            "ROAD_QUEUE": name,
            "ROAD_REPAIRER": "mends",
            "ROAD_EMBEDDED_RELAY": "1",
        }
        roads.append(road)
        return road

    yield make
    for road in roads:
        road.end()


def begin(road: Road) -> Process:
    """Start a worker; it has a name that no other one on the broker has."""
    return road.worker("-n", f"{road.folder.name}@%h")


def start(road: Road) -> Process:
    worker = begin(road)
    road.until(lambda: road.logged(" ready."), "the worker")
    return worker


# ── repairs ─────────────────────────────────────────────────────────────────────────────────────

BROKEN = """
from tests.faults.programs.repair_system import trade
with eda.transaction():
    for number in range(8):
        trade.delay(number, str(number))
"""


def test_each_repairs_its_own_messages(make_road: Made) -> None:
    north, south = make_road("north"), make_road("south")
    start(north)
    start(south)
    north.run(BROKEN)

    north.until(lambda: sum(mended(north, number) for number in range(8)) == 8, "all repairs")

    assert south.dead() == []
    assert [task for task, _ in north.dead()] == ["road.deal"] * 8


def mended(road: Road, account: int) -> bool:
    return road.effects(f"account {account}").total() == 1


# ── names ───────────────────────────────────────────────────────────────────────────────────────


def test_a_second_service_of_the_same_name_does_not_start(make_road: Made) -> None:
    first, second = make_road("shop"), make_road("shop")
    worker = start(first)
    intruder = begin(second)

    assert intruder.wait() != 0
    assert "A service with another database uses the name 'shop'" in intruder.log.read_text()
    assert worker.alive


def test_more_workers_of_one_service_and_services_of_other_names_start(make_road: Made) -> None:
    first = make_road("shop")
    workers = [start(first), start(make_road("shop", first.database)), start(make_road("bank"))]

    assert all(worker.alive for worker in workers)
