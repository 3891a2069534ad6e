"""The verdict on a road after faults: nothing lost, doubled, invented, out of order or stuck.

It is judged by the database alone: orders and accounts say what was committed, effects what came
of it.
"""

from __future__ import annotations

from collections import defaultdict

from sqlalchemy import insert, select

from tests.faults.conftest import Process, Road, expect_hits
from tests.faults.programs.tables import accounts, effects

#: Accounts of the trades.
AMONG = 10


def open_accounts(road: Road) -> None:
    with road.engine.begin() as connection:
        connection.execute(
            insert(accounts), [{"id": number, "visits": 0} for number in range(AMONG)]
        )


def traffic(road: Road, round_: int, size: int) -> list[Process]:
    """Producers of *size* orders and as many trades."""
    orders = road.producer(size * round_ + 1, size * (round_ + 1))
    trading = ["tests.faults.programs.trading", *map(str, (size, AMONG, round_))]
    return [orders, road._run(trading, None)]


def committed_trades(road: Road) -> dict[int, list[int]]:
    """The numbers of each account's committed trades."""
    with road.engine.connect() as connection:
        rows = connection.execute(select(accounts.c.id, accounts.c.visits)).all()
    return {account: list(range(1, number + 1)) for account, number in rows}


def trades(road: Road) -> dict[int, list[int]]:
    """The numbers of each account's trades, in the order in which they took effect."""
    taken: dict[int, list[int]] = defaultdict(list)
    query = select(effects.c.name, effects.c.number).order_by(effects.c.id)
    with road.engine.connect() as connection:
        for name, number in connection.execute(query):
            if name.startswith("account "):
                taken[int(name.removeprefix("account "))].append(number)
    return taken


def handled(road: Road) -> int:
    """Effects of orders and trades so far."""
    return road.effects().total() + sum(map(len, trades(road).values()))


def expect_all_once_in_order(road: Road, patience: float) -> None:
    """Everything committed has taken effect once, the trades of an account in their order."""
    everything = road.committed().total() + sum(map(len, committed_trades(road).values()))
    road.until(lambda: handled(road) >= everything, f"all {everything} effects", patience)
    road.settle(3.0)

    assert road.effects() == road.committed()
    taken = trades(road)
    assert {account: taken[account] for account in range(AMONG)} == committed_trades(road)
    assert road.dead() == []
    assert road.parked() == 0
    expect_hits(everything, "messages each took effect once, in order")
