"""Events between processes: each subscription takes effect once with each of them, on its own."""

from __future__ import annotations

import json
import signal
from collections import Counter

import pytest
from sqlalchemy import func, select

from celery_eda.core import checkpoints
from tests.faults.conftest import Process, Road, first_of, on_servers
from tests.faults.programs.tables import effects
from tests.faults.test_killed_at_every_step import RELAY_COPIES
from tests.support.servers.base import Server

ORDERS = 15
CUSTOMERS = 3
PLACED = Counter(number for number in range(1, ORDERS + 1) if number % 3)
#: What happens to a message in the worker; the first delivery counts nothing.
WORKER = ("delivery.received", "inbox.admitted", "delivery.handled", "delivery.committed")

everywhere = pytest.mark.parametrize(
    "road", ["rabbitmq-postgresql", "redis-mariadb", "eda-sqlite"], indirect=True
)


@pytest.fixture(autouse=True)
def eventful(road: Road) -> None:
    road.app = "tests.faults.programs.event_system"


def emitter(road: Road, fault: str | None = None) -> Process:
    return road._run(["tests.faults.programs.event_system", "1", str(ORDERS)], fault)


def emit(road: Road) -> None:
    assert emitter(road).wait() == 0, road.logs()


def subscribe(road: Road) -> Process:
    """Start a worker; its queues are there before anything is emitted."""
    worker = road.worker()
    road.until(lambda: road.logged("celery@") and road.logged(" ready."), "a worker")
    return worker


def expect_each_event_once(road: Road) -> None:
    names = ("order.placed", "order.paid", "cooked", "charge")
    for name in names:
        road.until(lambda name=name: len(road.effects(name)) >= len(PLACED), f"each {name}")
    road.until(lambda: sum(map(len, ledgers(road))) == 2 * len(PLACED), "whole ledgers")
    road.until(lambda: len(road.dead()) == len(PLACED), "the dead letters of the broken one")
    road.settle(3.0 if road.broker.startswith("redis") else 1.0)

    assert road.committed() == PLACED
    for name in names:
        assert road.effects(name) == PLACED, name
    assert not road.effects("order.looked.at")
    assert ledgers(road) == ledgers_of(PLACED)
    assert road.dead() == [("road.broken", "failed")] * len(PLACED)
    assert not road.effects("mended")


def ledgers(road: Road) -> list[list[int]]:
    """What each customer's ledger says, in the order in which it was written."""
    numbers = select(effects.c.number).order_by(effects.c.id)
    return [
        road._all(numbers.where(effects.c.name == f"ledger {customer}"))
        for customer in range(CUSTOMERS)
    ]


def ledgers_of(placed: Counter[int]) -> list[list[int]]:
    """What the ledgers have to say after these orders."""
    return [
        [2 * n + paid for n in sorted(placed) if n % CUSTOMERS == customer for paid in (0, 1)]
        for customer in range(CUSTOMERS)
    ]


def stored(road: Road) -> Counter[str]:
    """How many events of each name are in the store."""
    events = road.tables.events
    query = select(events.c.type, func.count()).group_by(events.c.type)
    with road.engine.connect() as connection:
        return Counter({row[0]: row[1] for row in connection.execute(query)})


@everywhere
def test_each_subscription_takes_effect_once_with_each_committed_event(road: Road) -> None:
    subscribe(road)
    road.relay()

    emit(road)

    expect_each_event_once(road)
    number = len(PLACED)
    assert stored(road) == {
        **dict.fromkeys(("order.placed", "order.paid", "order.looked.at"), number),
        **dict.fromkeys(("weather.changed", "kitchen.cooked"), number),
    }


@first_of("rabbitmq-postgresql", "redis-mariadb", "eda-sqlite")
def test_what_fails_for_good_is_redriven_to_its_own_subscription(road: Road) -> None:
    broken = subscribe(road)
    road.relay()
    emit(road)
    expect_each_event_once(road)

    broken.kill()
    road.worker(ROAD_MENDED="1")
    command = ["celery", "-A", road.app, "eda", "dead-letters", "redrive", "--yes", "--json"]
    redrive = road._run([*command, "--task", "road.broken"], None)

    assert redrive.wait() == 0, redrive.log.read_text()
    road.until(lambda: road.effects("mended") == PLACED, "all of them mended")
    road.settle(3.0 if road.broker.startswith("redis") else 1.0)
    assert road.effects("mended") == road.effects("cooked") == road.effects("charge") == PLACED


@first_of("rabbitmq-postgresql", "redis-mariadb", "eda-sqlite")
@pytest.mark.parametrize("step", RELAY_COPIES)
def test_a_killed_relay_loses_no_event(road: Road, step: str) -> None:
    subscribe(road)
    relay = road.relay(fault=road.fault(step))
    emit(road)

    road.until(road.struck(step).exists, f"a relay at {step}")
    assert relay.wait() == -signal.SIGKILL, road.logs()
    road.relay()

    expect_each_event_once(road)


@first_of("redis-mariadb", "rabbitmq-postgresql", "eda-sqlite")
@pytest.mark.parametrize("step", WORKER)
def test_a_killed_worker_loses_no_event_and_repeats_none(road: Road, step: str) -> None:
    assert step in checkpoints.STEPS
    road.relay()
    road.worker(fault=road.fault(step))
    road.until(lambda: road.logged(" ready."), "a worker")
    emit(road)

    road.until(road.struck(step).exists, f"a worker at {step}")

    expect_each_event_once(road)


@everywhere
def test_a_new_subscription_gets_what_happened_before_and_goes_on_without_gap_or_repetition(
    road: Road,
) -> None:
    road.app = "tests.faults.programs.order_system"  # whose relay knows of no subscription
    road.relay()
    emit(road)
    road.until(lambda: not road.waiting(), "all sent, to nobody")
    assert not road.dead()
    road.app = "tests.faults.programs.event_system"
    subscribe(road)
    later = road._run(
        ["tests.faults.programs.event_system", str(ORDERS + 1), str(2 * ORDERS)], None
    )
    assert later.wait() == 0, road.logs()
    road.until(road.parked, "what comes in order, but waits for what was before")

    for queue in ("road.ledger", "road.audit", "road.ledger"):  # the ledger twice: it is harmless
        command = [*("events", "replay", "--to", f"eda.on.road.{queue}"), "--yes", "--json"]
        replay = road._run(["celery", "-A", road.app, "eda", *command], None)
        assert replay.wait() == 0, replay.log.read_text()

    everything = Counter(number for number in range(1, 2 * ORDERS + 1) if number % 3)
    road.until(lambda: len(road.effects("order.paid")) == len(everything), "all of them audited")
    road.until(lambda: sum(map(len, ledgers(road))) >= 2 * len(everything), "whole ledgers")
    road.settle(3.0 if road.broker.startswith("redis") else 1.0)
    assert ledgers(road) == ledgers_of(everything)
    assert road.effects("order.placed") == road.effects("order.paid") == everything
    assert road.effects("cooked") == everything - PLACED
    assert not road.parked()


@first_of("rabbitmq-postgresql", "redis-mariadb", "eda-sqlite")
def test_what_a_replay_tells_publishes_nothing_until_a_person_lets_it(road: Road) -> None:
    road.app = "tests.faults.programs.order_system"
    road.relay()
    emit(road)
    road.until(lambda: not road.waiting(), "all sent, to nobody")
    road.app = "tests.faults.programs.event_system"
    subscribe(road)
    eda = ["celery", "-A", road.app, "eda"]

    replay = road._run(
        [*eda, "events", "replay", "--to", "eda.on.road.road.kitchen", "--yes"], None
    )
    assert replay.wait() == 0, replay.log.read_text()
    road.until(lambda: len(road.dead()) == len(PLACED), "dead letters of a handler that publishes")
    road.settle()
    assert road.dead() == [("road.kitchen", "failed")] * len(PLACED)
    assert road.logged("publishes road.charge, which must not leave") >= len(PLACED)
    assert not road.effects("cooked") | road.effects("charge")
    assert stored(road)["kitchen.cooked"] == 0

    redrive = ["dead-letters", "redrive", "--yes", "--json", "--task", "road.kitchen"]
    assert road._run([*eda, *redrive], None).wait() == 0, road.logs()
    road.until(lambda: road.effects("charge") == PLACED, "what follows from them, after all")
    assert road.effects("cooked") == PLACED


@everywhere
def test_a_dropped_subscription_gets_no_more_events(road: Road) -> None:
    command = ["celery", "-A", road.app, "eda", "subscriptions"]
    declare = road._run([*command, "declare"], None)
    assert declare.wait() == 0, declare.log.read_text()
    emit(road)
    road.relay()
    road.until(lambda: not road.waiting(), "all sent")
    assert waiting(road) == {"audit": 2, "kitchen": 1, "broken": 1, "ledger": 3}

    still_here = road._run([*command, "drop", "eda.on.road.road.audit", "--yes"], None)
    assert still_here.wait() == 1, "a worker of this app would make it again"
    road.app = command[2] = "tests.faults.programs.order_system"  # which has no subscriptions
    assert waiting(road) == {"audit": 2, "kitchen": 1, "broken": 1, "ledger": 3}, "they are gone"
    full = road._run([*command, "drop", "eda.on.road.road.audit", "--yes"], None)
    assert full.wait() == 1, "messages wait in it"
    drop = road._run([*command, "drop", "eda.on.road.road.audit", "--yes", "--force"], None)
    assert drop.wait() == 0, drop.log.read_text()

    assert waiting(road) == {"kitchen": 1, "broken": 1, "ledger": 3}
    road.app = "tests.faults.programs.event_system"
    assert waiting(road) == {"audit": None, "kitchen": 1, "broken": 1, "ledger": 3}


def waiting(road: Road) -> dict[str, float | None]:
    """How many events wait in each queue for each order; None if there is no such queue."""
    listed = road._run(["celery", "-A", road.app, "eda", "subscriptions", "list", "--json"], None)
    assert listed.wait() == 0, listed.log.read_text()
    found = json.loads(listed.log.read_text().splitlines()[-1])
    return {
        each["task"].partition(".")[2]: each["waiting"] / len(PLACED) if each["declared"] else None
        for each in found
    }


@everywhere
def test_a_worker_takes_from_the_subscriptions_that_it_is_told_to(road: Road) -> None:
    road.relay()
    road.worker("-Q", "eda.on.road.road.audit")
    road.until(lambda: road.logged(" ready."), "a worker")
    emit(road)

    road.until(lambda: road.effects("order.paid") == PLACED, "all of them audited")
    assert waiting(road) == {"audit": 0, "kitchen": 1, "broken": 1, "ledger": 3}


def told(road: Road, node: str) -> set[int]:
    """What the handler of every worker has been told on one of them.

    It is a plain task, so an event that is sent twice is told twice.
    """
    notes = road.folder / f"told {node}"
    return set(map(int, notes.read_text().split())) if notes.exists() else set()


@everywhere
def test_every_worker_is_told_what_happens_while_it_runs(road: Road) -> None:
    one = road.worker("-n", "one@%h", pool="threads")
    two = road.worker("-n", "two@%h", "-Q", "nothing")
    road.until(lambda: road.logged(" ready.") == 2, "two workers")

    emit(road)
    # It sends some events a second time, as a time-out of a slow machine would.
    road.relay(fault=road.fault("relay.published"))
    road.until(road.struck("relay.published").exists, "a relay that dies")
    road.relay()
    for node in ("one", "two"):
        road.until(lambda node=node: told(road, node) == set(PLACED), f"{node} to be told")

    two.kill()
    later = {number for number in range(ORDERS + 1, 2 * ORDERS + 1) if number % 3}
    emitting = road._run(
        ["tests.faults.programs.event_system", str(ORDERS + 1), str(2 * ORDERS)], None
    )
    assert emitting.wait() == 0, road.logs()
    road.until(lambda: told(road, "one") == set(PLACED) | later, "the other one to be told")
    assert told(road, "two") == set(PLACED)
    road.settle()
    assert not set(road.dead()) - {("road.broken", "failed")}
    assert one.alive


@on_servers
def test_events_wait_for_a_broker_that_is_away(road: Road, broker: Server) -> None:
    worker = subscribe(road)
    worker.kill()
    broker.kill()

    emit(road)
    road.relay()
    road.until(lambda: road.logged("stay in the outbox"), "a relay that waits")
    broker.start()
    road.worker()

    expect_each_event_once(road)
