"""Events while processes and servers die at random: nothing is lost, doubled, or out of balance."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import func, select, text

from celery_eda import Event
from celery_eda.databases.registry import dialect_of
from celery_eda.events.store import EventStore
from tests.faults.conftest import Process, Road, expect_hits, first_of
from tests.faults.programs.tables import accounts, effects
from tests.faults.test_order import kill_somebody
from tests.support.servers.base import Server

ORDERS = 60
STRIKES = 10
#: Numbers of the orders of the two who place them.
SEEDS = (1, 2)
OPENING, PORTIONS, CUSTOMERS, TILL, SHELF = 10_000, 60, 4, 100, 101
COPIES = text("SELECT id, state, price, seen FROM copies")
ENDS = ("order.delivered", "order.refunded", "order.refused")


@pytest.fixture(autouse=True)
def market(road: Road) -> None:
    road.app = "tests.faults.programs.market"
    road.environment["ROAD_MAX_DELIVERIES"] = "1000"  # every fault here takes many workers
    road.run("from tests.faults.programs import market; market.open_for_business()")


def command(
    road: Road, *words: str, code: int = 0, environment: dict[str, str] | None = None
) -> str:
    """What ``celery -A … eda`` prints with these *words*."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", road.app, "eda", *words],
        env=environment or road.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def log(road: Road) -> list[Event]:
    """Every event that was committed."""
    dialect = dialect_of(road.engine.url, claim_timeout=60)
    return list(EventStore(road.tables.events, dialect).follow(road.engine))


def rows(road: Road) -> list[tuple[Any, ...]]:
    """The copies."""
    with road.engine.connect() as connection:
        return sorted(tuple(row) for row in connection.execute(COPIES))


def folded(events: list[Event]) -> list[tuple[Any, ...]]:
    """What the copies have to say, from the log alone."""
    streams = defaultdict(list)
    for event in events:
        if event.category == "order":
            streams[event.key].append(event)
    return sorted(
        (str(key), one[-1].type, one[-1].data["price"], len(one)) for key, one in streams.items()
    )


def balances(road: Road) -> dict[int, int]:
    with road.engine.connect() as connection:
        return dict(connection.execute(select(accounts.c.id, accounts.c.visits)).all())  # type: ignore[arg-type]


def expect_a_market_in_balance(road: Road) -> list[Event]:
    """All orders have had their end, and everybody saw what happened, once and in order."""

    def ended() -> bool:
        types = Counter(road._all(select(road.tables.events.c.type)))
        return sum(types[each] for each in ENDS) == types["order.placed"] > 0

    def heard() -> bool:
        events, audited = road.tables.events, effects.c.name.like("@%")
        total = road._all(select(func.count()).select_from(events))[0]
        told = road._all(select(func.count()).select_from(effects).where(audited))[0]
        orders = road._all(select(func.count()).where(events.c.category == "order"))[0]
        story = effects.c.name.like("order.%")
        return told >= total and (
            road._all(select(func.count()).select_from(effects).where(story))[0] >= orders
        )

    road.until(ended, "an end of every order")
    road.until(heard, "everybody to hear of everything")
    road.until(lambda: rows(road) == folded(log(road)), "the copies to converge")
    road.settle(3.0 if road.broker.startswith("redis") else 1.0)

    events, money = log(road), balances(road)
    assert road.dead() == []
    assert road.parked() == 0
    audited = Counter(road._all(select(effects.c.name).where(effects.c.name.like("@%"))))
    assert audited == Counter(f"@{event.id}" for event in events)
    assert rows(road) == folded(events)
    assert stories(road) == told(events)
    types = Counter(event.type for event in events)
    assert sum(amount for id_, amount in money.items() if id_ != SHELF) == CUSTOMERS * OPENING
    assert money[SHELF] == PORTIONS - types["order.delivered"] >= 0
    assert money[TILL] == sum(e.data["price"] for e in events if e.type == "order.delivered")
    assert types["order.failed"] == types["order.refunded"]
    return events


def stories(road: Road) -> dict[int, list[str]]:
    """What happened to each order, in the order in which the storyteller heard of it."""
    query = select(effects.c.number, effects.c.name).where(effects.c.name.like("order.%"))
    found = defaultdict(list)
    with road.engine.connect() as connection:
        for number, name in connection.execute(query.order_by(effects.c.id)):
            found[number].append(name)
    return dict(found)


def told(events: list[Event]) -> dict[int, list[str]]:
    """The same from the log."""
    found = defaultdict(list)
    for event in sorted(events, key=lambda each: each.version or 0):
        if event.category == "order":
            found[event.data["order"]].append(event.type)
    return dict(found)


@first_of("rabbitmq-postgresql", "redis-mariadb")
@pytest.mark.timeout(600)
def test_a_market_stays_in_balance_while_processes_and_servers_die(
    road: Road, broker: Server, database: Server
) -> None:
    command(road, "subscriptions", "declare")
    workers = [road.worker(), road.worker("-n", "other@%h")]
    relays = [road.relay(), road.relay()]
    sellers = [
        road._run(["tests.faults.programs.market", str(seed), str(ORDERS)], None) for seed in SEEDS
    ]
    chance, kills = random.Random(7), 0

    for strike in range(STRIKES):
        match strike:
            case 3:
                restart(road, broker)
            case 6:
                restart(road, database)
            case _:
                kill_somebody(workers, relays, chance)
        kills += 1
        road.pause(chance.uniform(0.5, 1.5), "the system gets on")
        revive([*workers, *relays])
    for seller in sellers:
        assert seller.wait() == 0, road.logs()

    events = expect_a_market_in_balance(road)
    expect_hits(kills, "processes and servers killed")
    expect_hits(sum(event.type == "order.failed" for event in events), "orders undone")


def restart(road: Road, server: Server) -> None:
    server.kill()
    road.pause(0.5, "it is away for a while")
    server.start()


def revive(processes: list[Process]) -> None:
    for process in processes:
        if not process.alive:
            process.start()


@first_of("rabbitmq-postgresql", "redis-mariadb", "eda-sqlite")
def test_a_projection_is_made_anew_while_it_is_in_use_and_nothing_leaves(road: Road) -> None:
    command(road, "subscriptions", "declare")
    worker = road.worker()
    road.relay()
    assert road._run(["tests.faults.programs.market", "1", "30"], None).wait() == 0, road.logs()
    expect_a_market_in_balance(road)
    rebuild = ("projections", "rebuild", "market.copy")

    with nowhere() as (listener, url):
        told = {**road.environment, "ROAD_BROKER": url}
        # Killed when it has fed the shadow for the first time, and then begun again.
        killed = road._run(["celery", "-A", road.app, "eda", *rebuild], None, told)
        seller = road._run(["tests.faults.programs.market", "2", "30"], None)
        road.until(lambda: killed.log.read_text() or not killed.alive, "progress")
        killed.kill()
        made = json.loads(command(road, *rebuild, "--json", environment=told))
        assert seller.wait() == 0, road.logs()
        assert called(listener) == 0, "to send something, it would have to call"
    events = expect_a_market_in_balance(road)
    road.run(SPOIL)
    command(road, *rebuild)  # what it had not been told of by the log, nor by the live one
    compared = command(road, "projections", "compare", "market.copy", "--json", code=1)
    swapped = command(road, "projections", "swap", "market.copy", "--yes", "--json")

    assert made["events"] >= 30
    assert swapped == compared
    assert json.loads(swapped)["changed"] == len(folded(events))
    assert rows(road) == folded(events)
    assert worker.alive


SPOIL = """
from sqlalchemy import update
from tests.faults.programs import market
with eda.databases.engine.begin() as connection:
    connection.execute(update(market.copies).values(price=-1))
"""


@contextmanager
def nowhere() -> Iterator[tuple[socket.socket, str]]:
    """A port that answers nobody, and a broker's URL that leads there."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        listener.setblocking(False)
        yield listener, f"amqp://127.0.0.1:{listener.getsockname()[1]}//"


def called(listener: socket.socket) -> int:
    """How many have connected."""
    calls = 0
    with suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
            calls += 1
    return calls
