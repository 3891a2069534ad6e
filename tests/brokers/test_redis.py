"""Redis refuses, fills up, freezes and dies: no message is taken for delivered wrongly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
import redis
from kombu import Exchange, Queue

from celery_eda.brokers import SafeConnection
from celery_eda.brokers.base import CONFIRMED, Pipelined, Transport, publish_with
from celery_eda.core import addresses
from celery_eda.core.event import EVENT_EXCHANGE
from celery_eda.events.queues import EventQueues
from celery_eda.events.subscriptions import Subscription, Subscriptions
from tests.brokers.wires import PATIENCE, SLACK, BrokenWires
from tests.support.brokers import app_of
from tests.support.letters import (
    begin_two_at,
    confirmed,
    empty,
    ids,
    letter,
    letters,
    publish_until_confirmed,
    verdicts,
)
from tests.support.servers.proxy import Proxy
from tests.support.servers.redis import Redis


@pytest.fixture
def broker_url(redis_url: str) -> str:
    return redis_url


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, socket_timeout=10) as connection:
        yield connection


@pytest.fixture
def transport(redis_url: str, transport_to: Callable[..., Transport]) -> Transport:
    return transport_to(redis_url)


@pytest.fixture
def pipelined(transport: Transport) -> Pipelined:
    assert isinstance(transport, Pipelined)
    return transport


@pytest.fixture
def impatient(redis_url: str, transport_to: Callable[..., Pipelined]) -> Pipelined:
    """A transport that gives up soon."""
    return transport_to(redis_url, timeout=PATIENCE)


@pytest.fixture
def proxy(redis_server: Redis) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as wire:
        yield wire


@pytest.fixture
def wired(redis_url: str, proxy: Proxy, transport_to: Callable[..., Transport]) -> Transport:
    """A transport that gives up soon, by way of the proxy."""
    return transport_to(proxy.through(redis_url), timeout=PATIENCE)


class TestFormat:
    """The keys and their contents are those of kombu."""

    def test_the_keys_and_contents_are_those_of_kombu(
        self, redis_url: str, client: redis.Redis, transport: Transport
    ) -> None:
        batch = [
            letter(),
            letter(priority=6),
            letter("orders", exchange="events", routing_key="order.placed", expiration=2.5),
            letter(body=b"\x00\xff", headers={"nested": {"a": [1, None]}}),
        ]

        transport.publish(batch)

        ours = contents(client)
        client.flushdb()
        with app_of(redis_url).connection_for_write() as connection:
            orders = app_of(redis_url).amqp.queues["orders"]
            orders(connection.default_channel).declare()
            for message in batch:
                publish_with(connection.Producer(), message)
        assert ours == contents(client)
        assert set(ours) == {"letters", "letters\x06\x166", "orders"}

    def test_a_message_of_higher_priority_is_taken_first(
        self, redis_url: str, transport: Transport
    ) -> None:
        low, high = letter(priority=9), letter(priority=0)

        transport.publish([low, high])

        assert ids(empty(redis_url)) == [high.identity.id, low.identity.id]

    def test_the_prefix_of_keys_is_kept(
        self, redis_url: str, client: redis.Redis, transport_to: Callable[..., Transport]
    ) -> None:
        transport = transport_to(redis_url, broker_transport_options={"global_keyprefix": "shop:"})

        transport.publish(letters(3))

        assert client.llen("shop:letters") == 3


class TestEveryWorker:
    """Events for one worker's own list, which nobody tells the broker of when the worker dies."""

    def test_a_list_takes_events_for_as_long_as_its_worker_says_that_it_is_there(
        self, redis_url: str, client: redis.Redis, transport: Transport
    ) -> None:
        service: Any = SimpleNamespace(name="shop")
        mine = EventQueues(service, Subscriptions(service)).queue_for(
            Subscription("cache", ("order.#",), every_worker=True), "one@here"
        )
        event = letter(None, exchange=EVENT_EXCHANGE, routing_key="order.placed")
        with SafeConnection(redis_url) as connection:
            mine(connection.default_channel).declare()

            assert transport.publish([event]) == [CONFIRMED]
            assert client.llen(mine.name) == 1
            assert 0 < client.pttl(mine.name) <= 60_000
            client.delete(mine.name, f"{mine.name}.open")  # as time does

            assert transport.publish([event]) == [CONFIRMED], "and nobody is told of it"
            assert not client.exists(mine.name)
            mine(connection.default_channel).declare()
            assert transport.publish([event]) == [CONFIRMED]
            assert client.llen(mine.name) == 1


def contents(client: redis.Redis) -> dict[str, list[object]]:
    """What is in every list, without the tags that kombu draws by lot."""
    found: dict[str, list[object]] = {}
    for key in client.scan_iter(_type="list"):
        found[key.decode()] = messages = [json.loads(each) for each in client.lrange(key, 0, -1)]
        for message in messages:
            del message["properties"]["delivery_tag"]
    return found


class TestTwoBatches:
    """One batch is sent while the other is not answered yet; each gets its own answers."""

    def test_each_is_answered_in_its_turn(
        self, redis_url: str, client: redis.Redis, pipelined: Pipelined
    ) -> None:
        client.set("others", "not a list")
        batches = [letters(700), [letter("others"), *letters(600)], letters(3)]
        pipelined.begin(batches[0])
        answers = []
        for following in batches[1:]:
            pipelined.begin(following)
            answers.append(pipelined.finish())
        answers.append(pipelined.finish())

        assert [verdicts(each) for each in answers] == [
            ["confirmed"] * 700,
            ["refused"] + ["confirmed"] * 600,
            ["confirmed"] * 3,
        ]
        sent = [each.identity.id for batch in batches for each in batch]
        assert set(sent) - set(ids(empty(redis_url))) == {batches[1][0].identity.id}

    def test_what_was_answered_in_time_counts_though_it_is_asked_for_late(
        self, impatient: Pipelined
    ) -> None:
        impatient.begin(letters(600))
        time.sleep(PATIENCE + 0.5)

        assert verdicts(impatient.finish()) == ["confirmed"] * 600

    def test_an_outage_makes_both_unknown_and_the_next_one_is_sent_anew(
        self, redis_server: Redis, redis_url: str, impatient: Pipelined
    ) -> None:
        start = time.monotonic()
        answers = begin_two_at(redis_server, impatient)
        took = time.monotonic() - start

        assert answers == [["unknown"] * 20] * 2
        assert took < PATIENCE + SLACK
        batch = letters(20)
        publish_until_confirmed(impatient, batch)
        assert {each.identity.id for each in batch} <= set(ids(empty(redis_url)))

    def test_a_server_that_takes_nothing_makes_both_unknown(
        self, client: redis.Redis, pipelined: Pipelined
    ) -> None:
        client.config_set("maxmemory", 1)
        pipelined.begin(letters(3))
        pipelined.begin(letters(5))
        answers = [pipelined.finish(), pipelined.finish()]
        client.config_set("maxmemory", 0)

        assert [verdicts(each) for each in answers] == [["unknown"] * 3, ["unknown"] * 5]
        assert verdicts(pipelined.publish(letters(3))) == ["confirmed"] * 3

    def test_what_is_closed_forgets_what_was_under_way(
        self, redis_url: str, client: redis.Redis, pipelined: Pipelined
    ) -> None:
        client.set("others", "not a list")
        pipelined.begin(letters(300))
        pipelined.begin([letter("others")])
        pipelined.close()

        batch = [letter(), letter("others"), letter()]
        assert verdicts(pipelined.publish(batch)) == ["confirmed", "refused", "confirmed"]

    def test_a_queue_is_declared_while_a_batch_is_under_way_on_the_only_connection_of_the_pool(
        self, redis_url: str, transport_to: Callable[..., Pipelined]
    ) -> None:
        transport = transport_to(redis_url, broker_transport_options={"max_connections": 1})
        transport.begin(letters(3))
        transport.begin([letter("orders", exchange="events", routing_key="order.placed")])

        assert verdicts(transport.finish()) == ["confirmed"] * 3
        assert verdicts(transport.finish()) == ["confirmed"]


class TestRefusals:
    """A refusal concerns the message that it was meant for."""

    def test_a_key_of_another_type_is_the_fault_of_its_own_messages(
        self, redis_url: str, client: redis.Redis, transport: Transport
    ) -> None:
        transport.publish([letter("others")])
        client.set("others", "not a list")
        batch = [letter(), letter("others"), letter(), letter("others"), letter()]

        answers = transport.publish(batch)

        assert verdicts(answers) == ["confirmed", "refused"] * 2 + ["confirmed"]
        assert "WRONGTYPE" in answers[1].why
        assert set(ids(empty(redis_url))) == confirmed(batch, answers)

    def test_a_reply_that_nobody_waits_for_is_refused_between_messages_for_one_list(
        self, redis_url: str, transport: Transport
    ) -> None:
        reply = letter(None, routing_key=addresses.of_process())
        batch = [letter(), reply, letter(), letter(None, routing_key="letters"), reply]

        answers = transport.publish(batch)

        assert verdicts(answers) == ["confirmed", "refused"] + ["confirmed"] * 2 + ["refused"]
        assert answers[1].unroutable
        assert set(ids(empty(redis_url))) == confirmed(batch, answers)

    def test_a_binding_deleted_behind_our_back_is_declared_again_after_the_refusal(
        self, client: redis.Redis, transport: Transport
    ) -> None:
        sent = letter("orders", exchange="events", routing_key="order.placed")
        transport.publish([sent])
        client.flushdb()

        answers = [verdicts(transport.publish([sent, letter()])) for _ in range(2)]

        assert answers == [["refused", "confirmed"], ["confirmed", "confirmed"]]

    def test_a_broadcast_that_nobody_hears_is_refused(
        self, redis_url: str, client: redis.Redis, transport_to: Callable[..., Transport]
    ) -> None:
        news = Queue("news", Exchange("news", type="fanout"))
        transport = transport_to(redis_url, task_queues=[news])
        sent = letter("news", exchange="news", routing_key="")

        unheard = transport.publish([sent])
        with client.pubsub() as listener:
            listener.psubscribe("*.news*")
            listener.get_message(timeout=5)  # that it listens now
            answers = transport.publish([sent])
            heard = listener.get_message(timeout=5)

        assert verdicts(unheard) == ["refused"]
        assert verdicts(answers) == ["confirmed"]
        assert heard
        assert str(sent.identity.id).encode() in heard["data"]

    def test_closing_leaves_the_bindings_of_others_alone(
        self, redis_url: str, client: redis.Redis, transport_to: Callable[..., Transport]
    ) -> None:
        news = Queue("news", Exchange("news", type="fanout"), auto_delete=True)
        transport = transport_to(redis_url, task_queues=[news])
        with client.pubsub() as listener:
            listener.psubscribe("*.news*")
            listener.get_message(timeout=5)  # that it listens now
            answers = transport.publish([letter("news", exchange="news", routing_key="")])

        transport.close()

        assert verdicts(answers) == ["confirmed"]
        assert client.scard("_kombu.binding.news") == 1


class TestOutages:
    """An outage is nobody's fault, ends in time, and is over when the server is back."""

    def test_what_was_confirmed_survives_the_death_of_the_server(
        self, redis_server: Redis, redis_url: str, impatient: Transport
    ) -> None:
        kept: set[UUID] = set()
        unknown = 0
        impatient.publish([letter()])
        for number in range(5):
            batch = letters(200)
            kept |= confirmed(batch, impatient.publish(batch))
            killer = threading.Timer(0.02 + 0.03 * number, redis_server.kill)
            killer.start()
            while killer.is_alive():
                batch = letters(200)
                answers = impatient.publish(batch)
                kept |= confirmed(batch, answers)
                unknown += verdicts(answers).count("unknown")
                assert "refused" not in verdicts(answers)
            killer.join()
            unknown += verdicts(impatient.publish(letters(3))).count("unknown")
            redis_server.start()

        assert unknown
        assert kept
        publish_until_confirmed(impatient, [letter()])
        assert kept <= set(ids(empty(redis_url)))

    def test_a_frozen_server_does_not_hold_the_sender(
        self, redis_server: Redis, impatient: Transport
    ) -> None:
        impatient.publish([letter()])
        redis_server.freeze()
        start = time.monotonic()

        first = impatient.publish(letters(50))
        second = impatient.publish(letters(50))
        took = time.monotonic() - start
        redis_server.thaw()

        assert verdicts(first) == verdicts(second) == ["unknown"] * 50
        assert took < 2 * (PATIENCE + SLACK)
        publish_until_confirmed(impatient, letters(50))

    def test_a_server_without_memory_is_an_outage_that_ends(
        self, client: redis.Redis, transport: Transport
    ) -> None:
        transport.publish([letter()])
        client.config_set("maxmemory", 1)

        during = transport.publish(letters(10))
        client.config_set("maxmemory", 0)
        after = transport.publish(letters(10))

        assert verdicts(during) == ["unknown"] * 10
        assert "memory" in during[0].why
        assert verdicts(after) == ["confirmed"] * 10

    def test_a_replica_is_an_outage_that_ends(
        self, client: redis.Redis, transport: Transport
    ) -> None:
        transport.publish([letter()])
        client.execute_command("REPLICAOF", "127.0.0.1", "9")

        during = transport.publish(letters(10))
        client.execute_command("REPLICAOF", "NO", "ONE")
        after = transport.publish(letters(10))

        assert verdicts(during) == ["unknown"] * 10
        assert verdicts(after) == ["confirmed"] * 10

    def test_a_restart_between_batches_goes_unnoticed(
        self, redis_server: Redis, transport: Transport
    ) -> None:
        transport.publish([letter()])
        redis_server.kill()
        redis_server.start()

        answers = transport.publish(letters(10))

        assert verdicts(answers) == ["confirmed"] * 10

    def test_the_first_host_that_answers_is_used(
        self, redis_url: str, transport_to: Callable[..., Transport]
    ) -> None:
        transport = transport_to(f"redis://127.0.0.1:9/0;{redis_url}")

        answers = transport.publish(letters(10))

        assert verdicts(answers) == ["confirmed"] * 10


class TestWires(BrokenWires):
    """Those of every broker, and this broker's own."""

    def test_what_takes_its_time_on_a_slow_wire_arrives_since_no_part_of_it_hangs(
        self, redis_url: str, proxy: Proxy, transport_to: Callable[..., Transport]
    ) -> None:
        transport = transport_to(proxy.through(redis_url), timeout=12)
        transport.publish([letter()])
        proxy.delay(0.024)  # for each 64 KB: 40 MB take 15 s, and one hang may take 6

        answers = transport.publish(letters(300, body=b"x" * 100_000))

        assert verdicts(answers) == ["confirmed"] * 300

    def test_time_outs_of_the_user_are_kept_if_they_are_shorter(
        self, redis_url: str, proxy: Proxy, transport_to: Callable[..., Transport]
    ) -> None:
        transport = transport_to(
            proxy.through(redis_url), broker_transport_options={"socket_timeout": 0.5}
        )
        transport.publish([letter()])
        proxy.black_hole()
        start = time.monotonic()

        answers = transport.publish([letter()])

        assert verdicts(answers) == ["unknown"]
        assert (
            time.monotonic() - start < 0.5 + SLACK
        )  # half of the 20 s of the transport would be 10
