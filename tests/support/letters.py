"""Messages to a broker, and a reader that shares nothing with the sender."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any
from uuid import UUID

import amqp
from kombu import Connection, Queue

from celery_eda.brokers.base import Pipelined, PublishResult, Transport, Verdict
from celery_eda.core.identity import Identity
from celery_eda.core.message import Message
from tests.support.messages import BODY, message
from tests.support.waiting import BOUND


def letter(
    queue: str | None = "letters",
    *,
    exchange: str = "",
    routing_key: str | None = None,
    body: bytes = BODY,
    headers: dict[str, Any] | None = None,
    identity: Identity | None = None,
    **properties: Any,
) -> Message:
    """A task message with these *properties*; by default to *queue*, which is declared."""
    return message(
        "letters.add",
        identity=identity,
        body=body,
        headers=headers,
        properties=properties,
        exchange=exchange,
        queue=queue,
        routing_key=(queue or "") if routing_key is None else routing_key,
    )


def letters(number: int, queue: str = "letters", **more: Any) -> list[Message]:
    """So many task messages."""
    return [letter(queue, **more) for _ in range(number)]


def empty(url: str, queue: str = "letters", options: dict[str, Any] | None = None) -> list[Any]:
    """Take all messages out of *queue*, in their order, as kombu's."""
    taken = []
    with Connection(url, transport_options=options) as connection:
        bound = Queue(queue, no_declare=True)(connection.default_channel)
        while (message := bound.get(no_ack=True)) is not None:
            taken.append(message)
    return taken


def connection_to(url: str) -> amqp.Connection:
    """A connection to RabbitMQ for an operator's hands; closes at the end of a ``with``."""
    connection: amqp.Connection = Connection(url).connection
    return connection


def body_of(received: Any) -> bytes:
    """The body as it was sent; py-amqp decodes it where it can, and leaves out an empty one."""
    body = received.body or b""
    return body.encode() if isinstance(body, str) else body


def ids(received: Iterable[Any]) -> list[UUID]:
    """The ids of received messages."""
    return [UUID(message.headers["eda_id"]) for message in received]


def verdicts(answers: Iterable[PublishResult]) -> list[str]:
    """Only the verdicts, as words."""
    return [answer.verdict.value for answer in answers]


def confirmed(messages: Iterable[Message], answers: Iterable[PublishResult]) -> set[UUID]:
    """The ids of the messages that the broker took over."""
    return {
        message.identity.id
        for message, answer in zip(messages, answers, strict=True)
        if answer.verdict is Verdict.confirmed
    }


def publish_until_confirmed(transport: Transport, batch: list[Message]) -> None:
    """Send what is not confirmed again and again, as a relay does."""
    deadline = time.monotonic() + BOUND
    while batch:
        answers = transport.publish(batch)
        taken = confirmed(batch, answers)
        batch = [message for message in batch if message.identity.id not in taken]
        assert time.monotonic() < deadline, answers


def begin_two_at(server: Any, transport: Pipelined) -> list[list[str]]:
    """The verdicts on two batches of 20 that were begun while *server* was frozen; it goes on."""
    transport.publish([letter()])
    server.freeze()
    try:
        transport.begin(letters(20))
        transport.begin(letters(20))
        return [verdicts(transport.finish()), verdicts(transport.finish())]
    finally:
        server.thaw()
