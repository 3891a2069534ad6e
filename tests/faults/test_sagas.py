"""Sagas between processes: whoever dies, each ends honestly, and no money is made or lost."""

from __future__ import annotations

from collections import Counter

import pytest
from sqlalchemy import select

from celery_eda.core import checkpoints
from tests.faults.conftest import Road, first_of
from tests.faults.programs.tables import accounts

TRANSFERS = 12
NUMBERS = range(1, TRANSFERS + 1)
FAILING = [number for number in NUMBERS if number % 3 == 0]
WORKER = ("delivery.received", "inbox.admitted", "delivery.handled", "delivery.committed")


@pytest.fixture(autouse=True)
def bank(road: Road) -> None:
    road.app = "tests.faults.programs.bank"


def begin(road: Road) -> None:
    assert road._run(["tests.faults.programs.bank", str(TRANSFERS)], None).wait() == 0, road.logs()


def states(road: Road) -> Counter[str]:
    return Counter(road._all(select(road.tables.sagas.c.state)))


def expect_honest_ends(road: Road) -> None:
    good = TRANSFERS - len(FAILING)
    ends = Counter(completed=good, compensated=len(FAILING))
    road.until(lambda: states(road) == ends, f"honest ends, not {states(road)}")
    road.settle(3.0 if road.broker.startswith("redis") else 1.0)

    assert states(road) == ends
    assert road.effects("take") == road.effects("tell") == Counter(NUMBERS)
    assert road.effects("give back") == Counter(FAILING)
    assert road.effects("give") == Counter(NUMBERS) - Counter(FAILING)
    with road.engine.connect() as connection:
        money = dict(connection.execute(select(accounts.c.id, accounts.c.visits)).all())  # type: ignore[arg-type]
    assert money == {1: 100 - good, 2: 100 + good}
    assert road.dead() == []


@pytest.mark.parametrize(
    "road", ["rabbitmq-postgresql", "redis-mariadb", "eda-sqlite"], indirect=True
)
def test_every_transfer_is_made_or_undone(road: Road) -> None:
    road.worker()
    road.relay()

    begin(road)
    begin(road)  # the same ids: nothing more begins

    expect_honest_ends(road)


@first_of("rabbitmq-postgresql", "redis-mariadb", "eda-sqlite")
@pytest.mark.parametrize("step", WORKER)
def test_a_killed_worker_leaves_no_transfer_in_between(road: Road, step: str) -> None:
    assert step in checkpoints.STEPS
    road.relay()
    road.worker(fault=road.fault(step))
    begin(road)

    road.until(road.struck(step).exists, f"a worker at {step}")

    expect_honest_ends(road)
