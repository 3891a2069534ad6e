"""What every transport does, whichever broker it writes to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery

from celery_eda.brokers import BROKERS
from celery_eda.brokers.base import PublishResult, Transport, Verdict
from celery_eda.brokers.registry import transport_of
from celery_eda.core.message import Message
from tests.support.brokers import Broker, app_of
from tests.support.letters import body_of, confirmed, ids, letter, letters, verdicts


def test_what_is_confirmed_is_in_the_queue_in_the_order_of_sending(
    broker: Broker, transport: Transport
) -> None:
    batch = letters(20)

    answers = transport.publish(batch)

    assert verdicts(answers) == ["confirmed"] * 20
    received, sent = ids(broker.empty("letters")), [message.identity.id for message in batch]
    assert set(received) == set(sent)
    assert received == sent or not broker.ordered


def test_a_message_arrives_whole(broker: Broker, transport: Transport) -> None:
    sent = letter(body=b"\x00\xff\xce" * 100, headers={"nested": {"a": [1, None, "ü", True]}})

    transport.publish([sent])

    [received] = broker.empty("letters")
    assert body_of(received) == sent.body
    assert received.content_type == "application/json"
    assert received.content_encoding == "utf-8"
    assert received.headers == sent.headers
    assert received.properties["correlation_id"] == sent.properties["correlation_id"]
    assert received.properties["reply_to"] == sent.properties["reply_to"]
    assert received.properties["delivery_mode"] == 2


def test_a_message_larger_than_a_frame_and_an_empty_one_arrive(
    broker: Broker, transport: Transport
) -> None:
    bodies = [b"x" * 400_000, b"", b"y" * 131_064]

    transport.publish([letter(body=body) for body in bodies])

    assert sorted(map(body_of, broker.empty("letters"))) == sorted(bodies)


def test_an_empty_batch_has_no_answers(transport: Transport) -> None:
    assert transport.publish([]) == []


def test_batches_follow_each_other_on_one_connection(broker: Broker, transport: Transport) -> None:
    batches = [letters(7) for _ in range(5)]

    answers = [verdicts(transport.publish(batch)) for batch in batches]

    assert answers == [["confirmed"] * 7] * 5
    assert len(broker.empty("letters")) == 35


def test_a_message_that_no_queue_takes_is_refused_and_the_others_are_not(
    broker: Broker, transport: Transport
) -> None:
    routed = letter("orders", exchange="events", routing_key="order.placed")
    lost = letter("orders", exchange="events", routing_key="nobody.listens")
    batch = [routed, lost, letter(), lost, routed]

    answers = transport.publish(batch)

    assert verdicts(answers) == ["confirmed", "refused", "confirmed", "refused", "confirmed"]
    assert "nobody.listens" in answers[1].why
    assert ids(broker.empty("orders")) == [routed.identity.id] * 2


def test_a_message_to_an_exchange_that_does_not_exist_is_refused_alone(
    broker: Broker, transport: Transport
) -> None:
    batch = [*letters(5), letter(None, exchange="missing", routing_key="x"), *letters(5)]

    answers = transport.publish(batch)

    assert verdicts(answers) == ["confirmed"] * 5 + ["refused"] + ["confirmed"] * 5
    assert "missing" in answers[5].why
    assert set(ids(broker.empty("letters"))) == confirmed(batch, answers)


def test_a_message_that_cannot_be_encoded_is_refused_alone(
    broker: Broker, transport: Transport
) -> None:
    if not broker.serializes:
        pytest.skip("kombu would accept it, or has left half a message behind before it fails")
    batch = [letter(), letter(headers={"bad": object()}), letter()]

    answers = transport.publish(batch)

    assert verdicts(answers) == ["confirmed", "refused", "confirmed"]
    assert answers[1].why
    assert set(ids(broker.empty("letters"))) == confirmed(batch, answers)


def test_a_message_for_a_queue_that_the_app_does_not_know_is_refused_alone(
    broker: Broker, transport_to: Callable[..., Transport]
) -> None:
    transport = transport_to(
        broker.url, broker_transport_options=broker.options, task_create_missing_queues=False
    )

    answers = transport.publish([letter(), letter("unheard-of"), letter()])

    assert verdicts(answers) == ["confirmed", "refused", "confirmed"]
    assert "unheard-of" in answers[1].why


def test_a_queue_that_the_app_creates_when_missing_is_declared(
    broker: Broker, transport: Transport
) -> None:
    answers = transport.publish([letter("new")])

    assert verdicts(answers) == ["confirmed"]
    assert len(broker.empty("new")) == 1


def test_a_message_without_a_queue_is_sent_as_it_is(broker: Broker, transport: Transport) -> None:
    transport.publish([letter()])

    answers = transport.publish([letter(None, routing_key="letters")])

    assert verdicts(answers) == ["confirmed"]
    assert len(broker.empty("letters")) == 2


def test_a_message_may_be_in_a_batch_twice(broker: Broker, transport: Transport) -> None:
    twice = letter()

    answers = transport.publish([twice, letter(), twice])

    assert verdicts(answers) == ["confirmed"] * 3
    assert len(broker.empty("letters")) == 3


def test_closing_twice_is_harmless_and_sending_afterwards_connects_again(
    broker: Broker, transport: Transport
) -> None:
    transport.publish([letter()])
    transport.close()
    transport.close()

    answers = transport.publish([letter()])

    assert verdicts(answers) == ["confirmed"]
    assert len(broker.empty("letters")) == 2


@pytest.mark.parametrize("scheme", ["amqp", "redis", "eda+postgresql"])
def test_a_broker_that_is_not_there_makes_everything_unknown_at_once(
    scheme: str, transport_to: Callable[..., Transport]
) -> None:
    nobody = transport_to(f"{scheme}://127.0.0.1:9", timeout=600)
    start = time.monotonic()

    answers = nobody.publish(letters(3))

    assert verdicts(answers) == ["unknown"] * 3
    assert "refused" in answers[0].why
    assert time.monotonic() - start < 120


class Postbox:
    """A transport from somewhere else."""

    def __init__(self, app: Celery, *, timeout: float) -> None:
        self.app = app
        self.timeout = timeout

    def publish(self, messages: list[Message]) -> list[PublishResult]:
        return [PublishResult(Verdict.confirmed) for _ in messages]

    def close(self) -> None:
        pass


def test_a_private_vendor_is_named_by_module_and_class(monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_of("memory://")
    monkeypatch.setitem(BROKERS, "memory", f"{__name__}:Postbox")

    made: Any = transport_of(app, timeout=3)

    assert isinstance(made, Postbox)
    assert (made.app, made.timeout) == (app, 3)


@pytest.mark.parametrize(
    ("url", "transport"),
    [
        ("amqp://", "RabbitMQ"),
        ("amqps://", "RabbitMQ"),
        ("amqp://a//;amqp://b//", "RabbitMQ"),
        ("redis://", "Redis"),
        ("rediss://", "Redis"),
        ("sentinel://", "Redis"),
        ("memory://", "GenericTransport"),
        ("eda+sqlite:///queue.db", "Database"),
        ("eda+postgresql://nowhere/queue", "Database"),
    ],
)
def test_the_url_of_the_broker_chooses_the_transport(url: str, transport: str) -> None:
    made = transport_of(app_of(url), timeout=3)

    assert type(made).__name__ == transport
