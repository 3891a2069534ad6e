"""Per-key order while processes die: what is judged is the table of effects alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict
from contextlib import suppress

import psutil
import pytest
from sqlalchemy import insert, select

from tests.faults.conftest import SHORT, Process, Road, expect_hits
from tests.faults.programs.tables import accounts, effects

rabbitmq_and_redis = pytest.mark.parametrize(
    "road", ["rabbitmq-postgresql", "redis-mariadb"], indirect=True
)
on_all = pytest.mark.parametrize(
    "road", ["rabbitmq-postgresql", "redis-mariadb", "redis-sqlite", *SHORT], indirect=True
)


def open_accounts(road: Road, number: int) -> None:
    with road.engine.begin() as connection:
        rows = [{"id": account, "visits": 0} for account in range(number)]
        connection.execute(insert(accounts), rows)


def trades(road: Road, number: int, among: int, seed: int, **environment: str) -> Process:
    return road._run(
        ["tests.faults.programs.trading", *map(str, (number, among, seed))], None, environment
    )


def counted(road: Road) -> dict[int, int]:
    """How many trades of each account were committed."""
    with road.engine.connect() as connection:
        return dict(connection.execute(select(accounts.c.id, accounts.c.visits)).all())  # type: ignore[arg-type]


def taken_effect(road: Road) -> dict[int, list[int]]:
    """The numbers of each account's trades, in the order in which they took effect."""
    taken = defaultdict(list)
    with road.engine.connect() as connection:
        for name, number in connection.execute(
            select(effects.c.name, effects.c.number).order_by(effects.c.id)
        ):
            taken[int(name.removeprefix("account "))].append(number)
    return taken


def expect_order(road: Road, patience: float) -> None:
    """Every trade took effect once, and those of an account in their order."""
    total = sum(counted(road).values())
    road.until(lambda: sum(map(len, taken_effect(road).values())) >= total, "all trades", patience)
    road.settle(3.0 if road.broker.startswith("redis") else 1.0)

    taken = taken_effect(road)
    assert {account: taken[account] for account in counted(road)} == {
        account: list(range(1, number + 1)) for account, number in counted(road).items()
    }
    assert road.dead() == []
    assert road.parked() == 0


def kill_somebody(workers: list[Process], relays: list[Process], chance: random.Random) -> None:
    """A worker with its pool, one child of a pool, or a relay."""
    match chance.choice(["worker", "child", "child", "relay"]):
        case "worker":
            chance.choice(workers).kill()
        case "relay":
            chance.choice(relays).kill()
        case "child":
            with suppress(psutil.NoSuchProcess, IndexError):
                children = psutil.Process(chance.choice(workers).popen.pid).children()
                os.kill(chance.choice(children).pid, signal.SIGKILL)


def trade_under_fire(
    road: Road, total: int, among: int, *, workers: int, every: float, patience: float
) -> None:
    chance = random.Random()
    road.environment["ROAD_MAX_DELIVERIES"] = "1000"  # a message may be hit again and again
    open_accounts(road, among)
    producers = [trades(road, total // 2, among, seed) for seed in (1, 2)]
    busy = [road.worker("-n", f"worker{number}@%h") for number in range(workers)]
    relays = [road.relay(), road.relay()]
    struck = 0
    while any(each.alive for each in producers):
        time.sleep(every)  # the system gets on
        kill_somebody(busy, relays, chance)
        struck += 1
        for process in (*busy, *relays):  # what a supervisor does
            if not process.alive:
                process.start()
    assert [each.wait() for each in producers] == [0, 0], road.logs()

    expect_hits(struck, f"processes killed while {total} trades on {among} accounts were under way")
    expect_order(road, patience)
    expect_hits(road.logged("is parked until its predecessor"), "messages parked")


@on_all
def test_trades_take_effect_in_order_while_processes_are_killed(road: Road) -> None:
    trade_under_fire(road, 400, 20, workers=2, every=1.5, patience=150)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@rabbitmq_and_redis
def test_ten_thousand_trades_take_effect_in_order_under_fire(road: Road) -> None:
    trade_under_fire(road, 10_000, 100, workers=4, every=2.0, patience=900)


@pytest.mark.parametrize("road", ["rabbitmq-postgresql"], indirect=True)
def test_without_the_cursor_trades_take_effect_out_of_order(road: Road) -> None:
    """What the order is worth: several workers and relays mix up the trades of a busy account."""
    open_accounts(road, 1)
    producer = trades(road, 400, 1, 1)
    for number in (1, 2):
        road.worker("-n", f"worker{number}@%h", ROAD_MUTATION="no_order")
        road.relay()
    assert producer.wait() == 0
    road.until(lambda: len(taken_effect(road)[0]) >= 400, "all trades", 90)

    assert taken_effect(road)[0] != list(range(1, 401))
