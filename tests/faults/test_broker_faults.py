"""The broker dies, freezes, refuses, or cannot be reached: what was committed takes effect once."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from sqlalchemy import select

from tests.faults.conftest import Process, Road, expect_hits, first_of
from tests.support.letters import connection_to
from tests.support.servers.base import Server
from tests.support.servers.proxy import Proxy
from tests.support.servers.rabbitmq import RabbitMQ
from tests.support.servers.redis import Redis

ORDERS = 180
#: Time to recover on a busy machine: a restart, reconnecting, a redelivery.
HEALING = 240.0

on_rabbitmq = pytest.mark.parametrize("road", ["rabbitmq-postgresql"], indirect=True)
on_both = pytest.mark.parametrize("road", ["rabbitmq-postgresql", "redis-mariadb"], indirect=True)


def run_busily(road: Road) -> tuple[Process, Process]:
    """Start everything, with a backlog and a producer; returns the worker and the producer."""
    road.place(1, ORDERS)
    worker = road.worker()
    road.relay()
    road.relay()
    producer = road.producer(ORDERS + 1, 2 * ORDERS, ROAD_SEND_AFTER_COMMIT="1")
    road.until(lambda: len(road.effects()) >= 5, "first effects")
    expect_hits(len(road.committed()) - len(road.effects()), "messages under way at the fault")
    return worker, producer


def expect_each_effect_once(road: Road) -> None:
    road.until(lambda: len(road.effects()) >= len(road.committed()), "all effects", HEALING)
    road.settle(3.0)

    assert road.effects() == road.committed()
    assert road.dead() == []


def kill(road: Road, broker: Server) -> None:
    broker.kill()
    broker.start()


def freeze(road: Road, broker: Server) -> None:
    broker.freeze()
    road.pause(4, "longer than a relay waits for its confirms")
    broker.thaw()


def run_out_of_memory(road: Road, broker: RabbitMQ) -> None:
    broker.ctl("set_vm_memory_high_watermark", "0")
    try:
        road.pause(4, "longer than a relay waits for its confirms")
    finally:
        broker.ctl("set_vm_memory_high_watermark", "0.4")


def close_connections(road: Road, broker: RabbitMQ) -> None:
    broker.ctl("close_all_connections", "maintenance")


@pytest.mark.parametrize(
    ("road", "fault"),
    [
        ("rabbitmq-postgresql", kill),
        ("redis-mariadb", kill),
        ("rabbitmq-postgresql", freeze),
        ("redis-mariadb", freeze),
        ("rabbitmq-postgresql", run_out_of_memory),
        ("rabbitmq-postgresql", close_connections),
    ],
    indirect=["road"],
)
def test_a_fault_of_the_broker_under_load_loses_and_doubles_nothing(
    road: Road, broker: Server, fault: Callable[[Road, Server], None]
) -> None:
    _, producer = run_busily(road)

    fault(road, broker)

    assert producer.wait() == 0, road.logs()
    assert len(road.committed()) == 2 * ORDERS * 2 / 3
    expect_each_effect_once(road)


@on_rabbitmq
def test_a_user_deleted_and_created_again_delays_only(road: Road, rabbitmq: RabbitMQ) -> None:
    create_user(road, rabbitmq)
    road.environment["ROAD_BROKER"] = road.broker.replace("guest:guest", "shop:secret")
    worker, producer = run_busily(road)

    rabbitmq.ctl("delete_user", "shop")
    road.until(lambda: road.logged("ACCESS_REFUSED") or road.logged("403"), "a refused login")
    create_user(road, rabbitmq)
    worker.kill()  # Celery ends a worker whose password is wrong, in 30 s or so
    worker.start()

    assert producer.wait() == 0, road.logs()
    expect_each_effect_once(road)


def create_user(road: Road, rabbitmq: RabbitMQ) -> None:
    rabbitmq.ctl("add_user", "shop", "secret")
    host = unquote(urlsplit(road.broker).path[1:])
    rabbitmq.ctl("set_permissions", "-p", host, "shop", ".*", ".*", ".*")


@on_rabbitmq
def test_a_queue_deleted_while_the_relay_runs_is_declared_again(road: Road) -> None:
    worker = road.worker()
    road.relay()
    road.place(1, 30)
    expect_each_effect_once(road)
    worker.signal(signal.SIGSTOP)  # so that it is the relay who finds the queue missing

    with connection_to(road.broker) as connection:
        connection.channel().queue_delete("road")
    road.place(31, 60)
    road.until(lambda: road.waiting() == 0, "an empty outbox")
    worker.signal(signal.SIGCONT)

    expect_each_effect_once(road)
    expect_hits(road.logged("NO_ROUTE"), "refusals for want of the queue")


SEND_ASIDE = """
with eda.transaction():
    for number in range(1000, 1020):
        charge.apply_async((number,), queue="narrow")
    for number in range(2000, 2010):
        charge.apply_async((number,), exchange="nowhere", routing_key="x")
"""


@on_rabbitmq
def test_messages_that_cannot_be_sent_stay_and_say_why_while_others_flow(
    road: Road, rabbitmq: RabbitMQ
) -> None:
    host = unquote(urlsplit(road.broker).path[1:])
    limit = '{"max-length": 3, "overflow": "reject-publish"}'
    rabbitmq.ctl("set_policy", "-p", host, "--apply-to", "queues", "narrow", "^narrow$", limit)
    relay = road.relay(ROAD_SETTINGS='{"eda_retry_delay_max": 0.5, "eda_max_attempts": 10000}')
    road.run(SEND_ASIDE)
    road.until(lambda: len(refused(road, "no exchange")) == 10, "refusals for want of an exchange")
    road.until(lambda: len(refused(road, "full")) >= 10, "refusals for want of room")

    road.worker()
    road.place(1, 60)
    road.until(lambda: len(road.effects()) == 40, "the others to flow")
    full = refused(road, "full")
    missing = refused(road, "no exchange 'nowhere'")

    expect_hits(min(full), "attempts at the least at each message to the full queue")
    expect_hits(min(missing), "attempts at the least at each message to no exchange")
    assert len(full) >= 10
    assert len(missing) == 10
    assert road.effects() == road.committed()

    # Somebody reads the full queue, and the relay is told to give up sooner.
    road.worker("-Q", "narrow", "-n", "narrow@%h")
    road.until(lambda: len(road.effects()) == 60, "the queue that was full")
    relay.kill()
    road.relay(ROAD_SETTINGS=f'{{"eda_max_attempts": {min(missing) + 1}}}')
    road.settle()

    assert road.effects() == road.committed() + Counter(range(1000, 1020))
    assert road.dead() == [("road.charge", "unsendable")] * 10
    assert all("no exchange 'nowhere'" in why for why in errors(road))


def refused(road: Road, why: str) -> list[int]:
    """The attempts at each message that is in the outbox because of *why*."""
    columns = road.tables.outbox.c
    query = select(columns.attempts).where(columns.last_error.contains(why, autoescape=True))
    with road.engine.connect() as connection:
        return list(connection.scalars(query))


def errors(road: Road) -> list[Any]:
    with road.engine.connect() as connection:
        return list(connection.scalars(select(road.tables.dead_letters.c.error)))


CHORD = """
from celery import chord
with eda.transaction():
    for number in range(10):
        chord([add.s(number, 1), add.s(number, 2)], total.s()).delay()
"""


@on_both
def test_with_broker_and_backend_down_everything_commits_and_takes_effect_when_they_return(
    road: Road, broker: Server
) -> None:
    with_chords = road.broker.startswith("redis")  # the other backend, rpc, has none
    road.environment["ROAD_RESULTS"] = road.broker if with_chords else "rpc://"
    broker.kill()

    road.place(1, ORDERS)
    if with_chords:
        road.run(CHORD)

    expect_hits(road.waiting(), "messages committed without a broker")
    assert road.waiting() == len(road.committed()) + (20 if with_chords else 0)

    broker.start()
    road.relay()
    road.worker()
    expect_each_effect_once(road)
    if with_chords:
        road.until(lambda: road.effects("total").total() >= 10, "all chords", HEALING)
        road.settle(3.0)
        assert road.effects("total") == Counter(2 * number + 3 for number in range(10))
        assert road.effects("add") == Counter(list(range(10)) * 2)


MANY_CHORDS = """
from celery import chord
with eda.transaction():
    for number in range(30):
        chord([add.s(number, 1)], total.s()).delay()
"""


@on_rabbitmq
def test_messages_that_wait_for_the_result_backend_hold_up_no_others(
    road: Road, redis_server: Redis, redis_url: str
) -> None:
    road.environment["ROAD_RESULTS"] = redis_url
    road.environment["ROAD_SETTINGS"] = '{"eda_relay_batch": 20, "task_ignore_result": true}'
    redis_server.kill()

    road.run(MANY_CHORDS)
    road.place(1, 30)
    road.relay()
    road.worker()
    road.until(lambda: len(road.effects()) == 20, "the others to flow")
    expect_hits(road.waiting(), "messages waiting for the result backend")
    redis_server.start()
    road.until(lambda: road.effects("total").total() >= 30, "all chords", HEALING)

    expect_each_effect_once(road)
    assert road.effects("total") == Counter(number + 1 for number in range(30))
    assert road.dead() == []


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
    """Place orders under each of *faults* and, last, under cuts; count after each of them."""
    road.worker()
    road.relay()
    road.place(1, 3)
    expect_each_effect_once(road)

    for round_, name in enumerate(faults, start=1):
        given_up = road.logged("stay in the outbox")
        SILENT_FAULTS[name](wire)
        road.place(100 * round_, 100 * round_ + 29)
        road.until(lambda before=given_up: road.logged("stay in the outbox") > before, name)  # type: ignore[misc]
        expect_hits(len(road.committed()) - len(road.effects()), f"messages waiting: {name}")
        wire.heal()
        expect_each_effect_once(road)

    producer = road.producer(1000, 1059)
    for _ in range(5):
        road.pause(0.3, "cuts at different moments")
        wire.cut()
    assert producer.wait() == 0, road.logs()
    expect_each_effect_once(road)


@pytest.mark.parametrize(
    ("road", "fault"),
    [("rabbitmq-postgresql", "no answer arrives"), ("redis-mariadb", "black hole")],
    indirect=["road"],
)
def test_a_wire_to_the_broker_that_goes_silent_or_is_cut_loses_and_doubles_nothing(
    road: Road, broker_wire: Proxy, fault: str
) -> None:
    endure(road, broker_wire, [fault])


@pytest.mark.parametrize(
    "road",
    ["rabbitmq-postgresql", pytest.param("redis-mariadb", marks=pytest.mark.soak)],
    indirect=True,
)
def test_a_slow_wire_to_the_broker_is_only_slow(road: Road, broker_wire: Proxy) -> None:
    broker_wire.delay(0.15)
    road.worker()
    # Connecting, declaring and the first message alone are a dozen round trips of 0.3 s.
    road.relay(ROAD_PUBLISH_TIMEOUT="10", ROAD_CLAIM_TIMEOUT="30")

    road.place(1, 30)

    expect_each_effect_once(road)
    assert len(road.effects()) == 20


@first_of("rabbitmq-postgresql", "redis-mariadb")
def test_what_was_on_a_connection_that_is_cut_does_not_rest(road: Road, broker_wire: Proxy) -> None:
    """A message that rested would rest for longer than the test waits."""
    road.environment |= {"ROAD_PUBLISH_TIMEOUT": "300", "ROAD_CLAIM_TIMEOUT": "600"}
    road.run("with eda.transaction(): [charge.delay(number) for number in range(3000)]")
    broker_wire.delay(0.1)
    road.relay(ROAD_SETTINGS='{"eda_relay_batch": 1000}')
    for cuts in range(1, 4):
        road.pause(3, "messages come to be on the wire")
        broker_wire.cut()
        road.until(lambda least=cuts: road.logged("stay in the outbox") >= least, "a cut")  # type: ignore[misc]
    broker_wire.heal()
    road.worker()

    road.until(lambda: len(road.effects()) == 3000, "all effects")

    assert road.effects() == Counter(range(3000))
