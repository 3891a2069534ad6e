"""The database dies, refuses, or its answer is lost: effects and committed orders stay the same."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

import pytest
from kombu import Connection
from sqlalchemy import insert, select, update

from tests.faults.conftest import Road, expect_hits, first_of
from tests.faults.programs.tables import accounts
from tests.support.letters import empty, ids
from tests.support.servers.base import Server
from tests.support.servers.proxy import Proxy

ORDERS = 30
COMMITTED = Counter(number for number in range(1, ORDERS + 1) if number % 3)
HEALING = 240.0

on_postgresql = pytest.mark.parametrize("road", ["rabbitmq-postgresql"], indirect=True)
on_servers = pytest.mark.parametrize(
    "road", ["rabbitmq-postgresql", "redis-mariadb"], indirect=True
)
AGAIN = "delivery is repeated in"


def expect_each_effect_once(road: Road) -> None:
    road.until(lambda: len(road.effects()) >= len(road.committed()), "all effects", HEALING)
    road.settle(3.0)

    assert road.effects() == road.committed()
    assert road.dead() == []


def wake(road: Road, step: str) -> None:
    """Let the process go on that is frozen at *step*."""
    road.until(road.struck(step).read_text, "who is frozen")  # it is there before it says so
    os.kill(int(road.struck(step).read_text()), signal.SIGCONT)


# ── the server dies ─────────────────────────────────────────────────────────────────────────────


@on_servers
def test_a_database_killed_under_a_handler_and_under_a_relay_loses_and_doubles_nothing(
    road: Road, database: Server
) -> None:
    road.environment["ROAD_CLAIM_TIMEOUT"] = "60"
    road.worker(fault=road.fault("delivery.handled", "freeze"))
    road.relay()
    road.place(1, ORDERS)
    road.until(road.struck("delivery.handled").exists, "a handler that has written")
    road.relay(fault=road.fault("relay.confirmed", "freeze"))
    road.place(ORDERS + 1, 2 * ORDERS)
    # One of the relays may be quicker; the frozen one gets its turn sooner or later.
    place_until(road, road.struck("relay.confirmed").exists)

    database.kill()
    wake(road, "delivery.handled")
    wake(road, "relay.confirmed")
    road.pause(1, "they find the database gone")
    database.start()

    expect_each_effect_once(road)
    expect_hits(road.logged(AGAIN), "deliveries made again")
    expect_hits(road.logged("cannot reach the outbox"), "rounds of a relay without its outbox")


def place_until(road: Road, condition: Callable[[], bool]) -> None:
    for number in range(1000, 2000):
        if condition():
            return
        road.place(number, number)
    pytest.fail(f"not within 1000 orders\n{road.logs()}")


@first_of("redis-mariadb", "rabbitmq-postgresql")
def test_a_message_outlives_an_outage_longer_than_a_worker_waits(
    road: Road, database: Server
) -> None:
    road.environment["ROAD_SETTINGS"] = '{"eda_outage_patience": 1, "eda_max_deliveries": 2}'
    worker = road.worker(fault=road.fault("delivery.handled", "freeze"))
    road.relay()
    road.place(1, ORDERS)
    road.until(road.struck("delivery.handled").exists, "a handler that has written")

    database.kill()
    wake(road, "delivery.handled")
    road.until(lambda: road.logged("Reject") >= 8, "messages given back to the broker", 120)
    database.start()

    expect_each_effect_once(road)
    assert worker.alive


# ── the answer to COMMIT is lost, or the request ────────────────────────────────────────────────


@on_servers
@pytest.mark.parametrize("lost", ["the request", "the answer"])
def test_a_producer_whose_commit_is_cut_off_hears_of_it_and_nothing_is_halved(
    road: Road, database_wire: Proxy, lost: str
) -> None:
    producer = road.producer(1, ORDERS, fault=road.fault("outbox.written", "freeze"))
    road.until(road.struck("outbox.written").exists, "a producer about to commit")

    cut_off(road, database_wire, lost, "outbox.written", lambda: len(road.committed()) == 1)

    assert producer.wait() == 1
    assert producer.log.read_text().count("OperationalError")
    found = len(road.committed())
    assert found == road.waiting() == (1 if lost == "the answer" else 0)
    road.place(1, ORDERS)
    road.worker()
    road.relay()
    expect_each_effect_once(road)
    assert road.committed() == COMMITTED


@on_servers
@pytest.mark.parametrize("lost", ["the request", "the answer"])
def test_a_worker_whose_commit_is_cut_off_takes_effect_once(
    road: Road, database_wire: Proxy, lost: str
) -> None:
    road.place(1, 1)
    relay = road.relay()
    road.worker(fault=road.fault("delivery.handled", "freeze"))
    road.until(road.struck("delivery.handled").exists, "a handler about to commit")
    relay.kill()  # so that what the wire swallows is the worker's

    cut_off(road, database_wire, lost, "delivery.handled", lambda: road.effects()[1] == 1)

    expect_each_effect_once(road)
    expect_hits(road.logged(AGAIN), "deliveries made again")


def cut_off(road: Road, wire: Proxy, lost: str, step: str, committed: Callable[[], bool]) -> None:
    """Let a process go on to its COMMIT, with the wire swallowing the request or the answer."""
    if lost == "the request":
        wire.black_hole()
        wake(road, step)
    else:
        wire.one_way("up")
        wake(road, step)
        road.until(committed, "the commit")
    road.until(lambda: wire.lossy, f"{lost} swallowed")
    wire.heal()


# ── transactions that lose against others ───────────────────────────────────────────────────────


def open_accounts(road: Road) -> None:
    with road.engine.begin() as connection:
        connection.execute(insert(accounts), [{"id": 1, "visits": 0}, {"id": 2, "visits": 0}])


def visits(road: Road) -> list[int]:
    with road.engine.connect() as connection:
        return list(connection.scalars(select(accounts.c.visits).order_by(accounts.c.id)))


@on_servers
def test_handlers_in_a_deadlock_both_take_effect_once(road: Road) -> None:
    open_accounts(road)
    road.worker()
    road.relay()

    road.run("with eda.transaction():\n visit.delay(1, [1, 2])\n visit.delay(2, [2, 1])")
    road.until(lambda: road.effects("visit").total() >= 2, "both")
    road.settle(3.0)

    expect_hits(road.logged(AGAIN), "deadlocks")
    assert road.effects("visit") == Counter([1, 2])
    assert visits(road) == [2, 2]
    assert road.dead() == []


LOCK_TIMEOUTS = {
    "rabbitmq-postgresql": "SET LOCAL lock_timeout = 200",
    "redis-mariadb": "SET innodb_lock_wait_timeout = 1",
}


@pytest.mark.parametrize(
    ("road", "setting"), LOCK_TIMEOUTS.items(), indirect=["road"], ids=list(LOCK_TIMEOUTS)
)
def test_a_handler_that_waits_too_long_for_a_lock_takes_effect_later(
    road: Road, setting: str
) -> None:
    road.environment["ROAD_SETTINGS"] = '{"eda_outage_patience": 1, "eda_max_deliveries": 1}'
    open_accounts(road)
    road.worker()
    road.relay()

    with road.engine.begin() as connection:
        connection.execute(update(accounts).where(accounts.c.id == 1).values(visits=10))
        road.run(f"with eda.transaction():\n visit.delay(1, [1], {setting!r})")
        road.until(lambda: road.logged("Reject") >= 4, "given back more often than workers may die")
        assert road.effects("visit").total() == 0
    road.until(lambda: road.effects("visit").total() >= 1, "the effect")
    road.settle(3.0)

    expect_hits(road.logged("Reject"), "lines about deliveries given back over a lock")
    assert road.effects("visit") == Counter([1])
    assert visits(road) == [11, 0]
    assert road.dead() == []


@on_postgresql
def test_handlers_that_cannot_be_serialized_take_effect_once_each(road: Road) -> None:
    road.worker("-c4", ROAD_ENGINE='{"isolation_level": "SERIALIZABLE"}')
    road.relay()

    road.run("with eda.transaction():\n for _ in range(40): tally.delay()")
    road.until(lambda: road.effects("tally").total() >= 40, "all of them", HEALING)
    road.settle(3.0)

    expect_hits(road.logged(AGAIN), "serialization failures")
    assert road.effects("tally") == Counter(range(40))
    assert road.dead() == []


# ── no connection to be had ─────────────────────────────────────────────────────────────────────

PLACE_WITHOUT = """
from sqlalchemy.exc import SQLAlchemyError
from tests.faults.programs import place_orders as produce
failures = 0
for number in range(1, 11):
    try:
        produce.place(number)
    except SQLAlchemyError:
        failures += 1
assert failures == 10, failures
"""
PLACE_WITH_A_FULL_POOL = (
    """
with eda.databases.engine.connect():
    pass
held = eda.databases.engine.connect()
"""
    + PLACE_WITHOUT
)


@first_of("rabbitmq-postgresql", "redis-mariadb")
def test_publishing_fails_together_with_the_work_where_no_connection_is_to_be_had(
    road: Road, database_wire: Proxy
) -> None:
    road.run(PLACE_WITH_A_FULL_POOL, ROAD_ENGINE=SMALL_POOL)
    database_wire.refuse()
    road.run(PLACE_WITHOUT)
    database_wire.heal()

    expect_hits(20, "transactions failed loudly")
    assert road.committed() == Counter()
    assert road.waiting() == 0


SMALL_POOL = '{"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.2}'


@first_of("rabbitmq-postgresql", "redis-mariadb")
def test_a_worker_whose_pool_of_connections_is_too_small_takes_its_time(road: Road) -> None:
    road.worker("-c4", pool="threads", ROAD_ENGINE=SMALL_POOL)
    road.relay()

    road.run("with eda.transaction():\n for number in range(12): slow.delay(number, 0.3)")
    road.until(lambda: road.effects("slow").total() >= 12, "all of them", HEALING)
    road.settle(3.0)

    expect_hits(road.logged(AGAIN), "deliveries that found no connection")
    assert road.effects("slow") == Counter(range(12))
    assert road.dead() == []


# ── the wire ────────────────────────────────────────────────────────────────────────────────────


def refuse(wire: Proxy) -> None:
    wire.refuse()
    wire.cut()


#: What a wire can do other than to be cut.
SILENT_FAULTS: dict[str, Callable[[Proxy], None]] = {
    "refused": refuse,
    "black hole": Proxy.black_hole,
    "nothing arrives": partial(Proxy.one_way, direction="down"),
    "no answer arrives": partial(Proxy.one_way, direction="up"),
}


def endure(road: Road, wire: Proxy, faults: Iterable[str]) -> None:
    """Place orders while each of *faults* sets in and, last, under cuts; count after each."""
    road.worker()
    road.relay()
    place_in_spite(road, 1, 3)
    expect_each_effect_once(road)

    for round_, name in enumerate(faults, start=1):
        before = len(road.committed())
        producer = road.producer(1000 * round_, 1000 * round_ + 299)
        road.until(lambda before=before: len(road.committed()) > before + 3, name)  # type: ignore[misc]
        SILENT_FAULTS[name](wire)
        road.pause(2, "processes run into it")
        placed = len(road.committed()) - before
        expect_hits(200 - placed, f"orders that the fault kept from being placed: {name}")
        wire.heal()
        producer.wait()
        place_in_spite(road, 1000 * round_, 1000 * round_ + 299)
        expect_each_effect_once(road)

    producer = road.producer(6000, 6059)
    for _ in range(5):
        road.pause(0.3, "cuts at different moments")
        wire.cut()
    producer.wait()
    place_in_spite(road, 6000, 6059)
    expect_each_effect_once(road)


@pytest.mark.parametrize(
    ("road", "fault"),
    [
        ("rabbitmq-postgresql", "black hole"),
        pytest.param("redis-mariadb", "no answer arrives", marks=pytest.mark.soak),
    ],
    indirect=["road"],
)
def test_a_wire_to_the_database_that_goes_silent_or_is_cut_loses_and_doubles_nothing(
    road: Road, database_wire: Proxy, fault: str
) -> None:
    endure(road, database_wire, [fault])


@pytest.mark.soak
@pytest.mark.parametrize(
    "road",
    ["redis-mariadb", "rabbitmq-postgresql"],
    indirect=True,
)
def test_a_slow_wire_to_the_database_is_only_slow(road: Road, database_wire: Proxy) -> None:
    database_wire.delay(0.15)
    road.worker()
    road.relay()

    road.place(1, 9)

    expect_each_effect_once(road)
    assert len(road.effects()) == 6


def place_in_spite(road: Road, first: int, last: int) -> None:
    """Place orders again until the producer has heard that all are committed."""
    producer = road.producer(first, last)
    while producer.wait():
        producer.start()


# ── copies at the same moment ───────────────────────────────────────────────────────────────────


def test_five_copies_at_the_same_moment_have_one_effect(road: Road) -> None:
    road.run("with eda.transaction():\n for number in range(6): slow.delay(number, 0.3)")
    relay = road.relay()
    road.until(lambda: road.waiting() == 0, "six messages on the wire")
    relay.kill()
    originals = empty(road.broker, "road")
    road.worker()
    road.worker("-n", "other@%h")
    road.until(lambda: road.logged(" ready.") == 2, "two workers")

    with Connection(road.broker) as connection:
        producer = connection.Producer()
        for message in originals:
            for _ in range(5):
                producer.publish(
                    message.body,
                    routing_key="road",
                    content_type=message.content_type,
                    content_encoding=message.content_encoding,
                    headers=message.headers,
                    correlation_id=message.properties["correlation_id"],
                )
    road.until(lambda: road.logged("received") >= 30, "all copies")
    road.until(lambda: road.effects("slow").total() >= 6, "six effects")
    road.settle(4.0)  # Redis brings back what waits longer than its visibility timeout
    road.until(lambda: finished(road) >= road.logged("received") >= 30, "the end of all copies")
    for process in road.processes:
        process.signal(signal.SIGTERM)
    for process in road.processes:
        process.wait()

    expect_hits(road.logged("received") - 6, "copies taken in beside the six")
    assert len(set(ids(originals))) == 6
    assert road.effects("slow") == Counter(range(6))
    assert empty(road.broker, "road") == []


def finished(road: Road) -> int:
    return road.logged("succeeded in") + road.logged("ignored")
