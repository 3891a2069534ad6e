"""Taking from several lists of Redis: a message in any of them is heard of at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, Consumer, Queue

from celery_eda.brokers import SafeConnection
from celery_eda.brokers.redis import consume
from tests.support.servers.redis import Redis

NAMES = ("a", "b", "c")
#: Seconds that a wait for one list would last here; the tests give up long before.
LONG = 60.0
PATIENCE = 120.0


class Taker:
    """A consumer of several queues, and what it has got."""

    def __init__(self, url: str, **options: Any) -> None:
        self.connection = SafeConnection(url, transport_options=options)
        self.bodies: list[str] = []
        self.consumer = Consumer(
            self.connection.channel(), [Queue(name) for name in NAMES], callbacks=[self.get]
        )
        self.consumer.consume()

    def get(self, body: Any, message: Any) -> None:
        self.bodies.append(body)
        message.ack()

    def wait(self, number: int) -> None:
        """Take *number* messages."""
        while len(self.bodies) < number:
            self.connection.drain_events(timeout=PATIENCE)


@pytest.fixture(autouse=True)
def _long_glances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consume, "LOW_PRIORITY_POLL", LONG)


@pytest.fixture(params=["", "prefix-"])
def taker(redis_url: str, request: pytest.FixtureRequest) -> Iterator[Taker]:
    options = {"global_keyprefix": request.param} if request.param else {}
    taker = Taker(redis_url, **options)
    yield taker
    # Closing waits for the wait under way.
    consume.LOW_PRIORITY_POLL = 0.1
    put(taker, "a")
    taker.connection.close()


def put(taker: Taker, name: str, **options_of_message: Any) -> None:
    options = taker.connection.transport_options
    with Connection(taker.connection.as_uri(include_password=True)) as connection:
        connection.transport_options = options
        connection.Producer().publish(f"to {name}", routing_key=name, **options_of_message)


@pytest.mark.parametrize("order", ["abc", "cba", "bbb", "acacac"])
def test_a_message_in_any_list_ends_the_wait(taker: Taker, order: str) -> None:
    for number, name in enumerate(order, start=1):
        later = threading.Timer(0.3, put, (taker, name))
        later.start()
        taker.wait(number)
        later.join()

    assert taker.bodies == [f"to {name}" for name in order]


def test_a_bell_that_has_lost_its_connection_is_hung_up_again(
    taker: Taker, redis_server: Redis
) -> None:
    put(taker, "c")
    taker.wait(1)
    later = threading.Timer(0.3, put, (taker, "b"))
    later.start()
    taker.wait(2)
    for bell in taker.consumer.channel.bells.values():
        bell.connection.disconnect()
    for name in "abc":
        later = threading.Timer(0.3, put, (taker, name))
        later.start()
        taker.wait(3 + "abc".index(name))

    assert sorted(taker.bodies[2:]) == ["to a", "to b", "to c"]


@pytest.mark.parametrize(
    "text", ["a\ud800b", "\udc00\\ud800", "\\ud800\\", "🙂\ud83d", '\ud800"\\']
)
def test_half_a_surrogate_pair_is_read_as_it_was_sent(taker: Taker, text: str) -> None:
    """Lua cannot read it, so the script must not take it for malformed."""
    heard: list[str] = []
    taker.consumer.register_callback(lambda _, message: heard.append(message.headers["text"]))
    put(taker, "a", headers={"text": text})

    taker.wait(1)

    assert heard == [text]
