"""A message through the outbox is the message that Celery would have sent, byte for byte.

Each scenario runs twice against one broker: in a plain Celery app, and in a transaction of the
same app with celery_eda, whose relay's transport then sends it. What is compared is what is
written to the broker's socket and what arrives in its queues: route, properties, headers, body.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from celery import Celery
from kombu.transport.virtual import Channel
from kombu.utils import uuid as make_id

from tests.parity.scenarios import CALLED, HANDLED, NOW, Scenario
from tests.parity.shop import OutboxShop, Shop, configured
from tests.parity.wire import (
    AMQPTap,
    Letter,
    RedisListener,
    amqp_without_identity,
    arrived_in_rabbitmq,
    json_without_identity,
)

#: A native delay, which only plain Celery leaves to RabbitMQ: where to, after 28 bits.
NATIVE_DELAY = re.compile(r"(?:[01]\.){28}(.+)")


#: Broker and database of each street.
STREETS = ("rabbitmq-postgresql", "rabbitmq-quorum-mariadb", "redis-sqlite")


#: A template is filled in the same way whatever kind the queues of a broker are.
once_for_each_broker = pytest.mark.parametrize(
    "street",
    [
        each if "quorum" not in each else pytest.param(each, marks=pytest.mark.soak)
        for each in STREETS
    ],
    indirect=True,
    scope="module",
)


@dataclass(frozen=True)
class Letters:
    """What was written to the broker's socket, and what arrived in its queues."""

    written: list[Letter]
    arrived: list[Letter]

    @property
    def delayed(self) -> bool:
        """Whether the broker has been asked to hold one of them back."""
        return any(NATIVE_DELAY.fullmatch(each.place[-1]) for each in self.written)


@dataclass(frozen=True)
class Street:
    """A plain shop and one with an outbox, which write to the same broker."""

    plain: Shop
    outbox: OutboxShop
    #: Takes everything that was sent since the last call.
    letters: Callable[[], Letters]


def without_identity(letters: Letters, strip: Callable[[bytes], bytes]) -> Letters:
    """The same letters without the headers that celery_eda adds."""
    return Letters(
        *(
            [replace(each, envelope=strip(each.envelope)) for each in kind]
            for kind in (letters.written, letters.arrived)
        )
    )


def undelayed(letter: Letter) -> Letter:
    """The same letter without the broker's own delay: the outbox keeps delays itself."""
    if found := NATIVE_DELAY.fullmatch(letter.place[-1]):
        return replace(letter, place=("shop", found[1]))
    return letter


@contextmanager
def pinned(seed: str) -> Iterator[None]:
    """The same ids and the same time for whatever runs in the block with the same *seed*."""
    ids = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            make_id,
            "__defaults__",
            (lambda: UUID(int=ids.getrandbits(128), version=4),),
        )
        # By itself each delivery would use up one of the ids.
        patch.setattr(Channel, "_next_delivery_tag", lambda _: "its tag")
        patch.setattr(Celery, "now", lambda _: NOW)
        yield


def publish(shop: Shop, scenario: Scenario) -> None:
    shop.app.set_current()
    with pinned("publish"):
        with shop.transaction():
            scenario(shop)
        shop.send()


def handle(shop: Shop) -> None:
    """Handle one message, and send what that publishes."""
    with pinned("handle"):
        shop.work()
        shop.send()


@pytest.fixture(scope="module", params=STREETS)
def street(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Street]:
    """Both shops on each broker."""
    build = rabbitmq_street if request.param.startswith("rabbitmq") else redis_street
    with build(request, tmp_path_factory.mktemp("street")) as street:
        yield street


def _started(request: pytest.FixtureRequest, name: str) -> Any:
    """A server, running: an earlier test may have killed it."""
    server = request.getfixturevalue(name)
    server.start()
    return server


@contextmanager
def rabbitmq_street(request: pytest.FixtureRequest, folder: Path) -> Iterator[Street]:
    server = _started(request, "rabbitmq")
    # A name for each street: apps of one URL share kombu's pool, and the connections in it end with
    # their virtual host.
    host = f"differential-{request.param}"
    url = server.vhost(host)
    if quorum := "quorum" in request.param:
        database = _started(request, "mariadb").database("differential")
        results = f"db+sqlite:///{folder}/results"
    else:
        database = _started(request, "postgresql").database("differential")
        results = _started(request, "redis_server").database(0)
    with AMQPTap().listening() as tap:
        shops = [
            kind(configured(url, results, database, quorum=quorum)) for kind in (Shop, OutboxShop)
        ]
        shops[0].open(delays=quorum)
        names = [queue.name for queue in shops[0].queues]

        def letters() -> Letters:
            found = Letters(tap.take(), arrived_in_rabbitmq(url, names))
            return without_identity(found, amqp_without_identity)

        yield Street(*shops, letters)
    server.drop(host)


@contextmanager
def redis_street(request: pytest.FixtureRequest, folder: Path) -> Iterator[Street]:
    server = _started(request, "redis_server")
    url, results = server.database(1), server.database(2)
    shops = [
        kind(configured(url, results, f"sqlite:///{folder}/shop.db", quorum=False))
        for kind in (Shop, OutboxShop)
    ]
    shops[0].open(delays=False)
    listener = RedisListener(url)

    def letters() -> Letters:
        return without_identity(Letters([], listener.take()), json_without_identity)

    yield Street(*shops, letters)
    listener.close()


@pytest.mark.parametrize("name", CALLED)
def test_what_is_published_in_a_transaction_is_what_celery_would_send(
    street: Street, name: str
) -> None:
    publish(street.plain, CALLED[name])
    plain = street.letters()

    publish(street.outbox, CALLED[name])
    ours = street.letters()

    assert plain.written + plain.arrived, "the scenario publishes something"
    assert ours.written == [undelayed(each) for each in plain.written]
    assert plain.delayed or ours.arrived == plain.arrived
    assert not ours.delayed


@once_for_each_broker
@pytest.mark.parametrize("name", CALLED)
def test_what_is_published_once_more_is_what_was_published_before(
    street: Street, name: str
) -> None:
    """By then the form of a message may be known, and Celery is not asked to make it."""
    publish(street.outbox, CALLED[name])
    first = street.letters()

    publish(street.outbox, CALLED[name])

    assert street.letters() == first


@pytest.mark.parametrize("name", HANDLED)
def test_what_a_handled_message_publishes_is_what_celery_would_send(
    street: Street, name: str
) -> None:
    publish(street.plain, HANDLED[name])
    handle(street.plain)
    plain = street.letters()

    publish(street.outbox, HANDLED[name])
    handle(street.outbox)
    ours = street.letters()

    assert ours.written == [undelayed(each) for each in plain.written]
    assert plain.delayed or ours.arrived == plain.arrived
