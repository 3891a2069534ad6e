"""What really leaves for a broker and what arrives there, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from struct import unpack_from
from typing import Any
from urllib.parse import urlsplit

import amqp
import pytest
import redis
from amqp.serialization import loads
from amqp.spec import Basic
from amqp.transport import TCPTransport
from kombu import Connection

from celery_eda.core.identity import ID_HEADER, REVISION_HEADER

METHOD, HEADER, BODY = 1, 2, 3


@dataclass(frozen=True)
class Letter:
    """One message: where it went, and its bytes.

    Attributes:
        place: exchange and routing key, a queue's name, or the key of a list.
        envelope: properties and headers, as the protocol serializes them.
    """

    place: tuple[str, ...]
    envelope: bytes
    body: bytes = b""


class AMQPTap:
    """Every message that a process writes to AMQP sockets, in the order of writing."""

    def __init__(self) -> None:
        self.letters: list[Letter] = []
        self._open: dict[int, tuple[tuple[str, str], bytes, int, bytes]] = {}
        self._place = ("", "")

    @contextmanager
    def listening(self) -> Iterator[AMQPTap]:
        """Hear what is written on connections that are made from now on."""
        write = TCPTransport.write

        def heard(transport: Any, frames: Any) -> None:
            self._hear(id(transport), bytes(frames))
            write(transport, frames)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TCPTransport, "write", heard)
            yield self

    def take(self) -> list[Letter]:
        taken, self.letters = self.letters, []
        return taken

    def _hear(self, connection: int, frames: bytes) -> None:
        at = 0
        while at < len(frames) and frames[at : at + 4] != b"AMQP":
            kind, _, size = unpack_from(">BHI", frames, at)
            payload = frames[at + 7 : at + 7 + size]
            at += size + 8
            if kind == METHOD and unpack_from(">HH", payload) == Basic.Publish:
                _, exchange, routing_key = loads("Bss", payload, 4)[0]
                self._place = exchange, routing_key
            elif kind == HEADER:
                length = unpack_from(">Q", payload, 4)[0]
                self._grow(connection, (self._place, payload[12:], length, b""))
            elif kind == BODY:
                place, envelope, length, body = self._open[connection]
                self._grow(connection, (place, envelope, length, body + payload))

    def _grow(self, connection: int, letter: tuple[tuple[str, str], bytes, int, bytes]) -> None:
        place, envelope, length, body = self._open[connection] = letter
        if len(body) == length:
            self.letters.append(Letter(place, envelope, self._open.pop(connection)[3]))


def amqp_without_identity(envelope: bytes) -> bytes:
    """The same properties without the two headers that celery_eda adds.

    And without the time to live that it leaves out: the header ``expires`` says the same.
    """
    message = amqp.Message()
    message._load_properties(Basic.CLASS_ID, envelope, 0)
    assert message._serialize_properties() == envelope, "py-amqp reads what it would write"
    for name in (ID_HEADER, REVISION_HEADER):
        message.headers.pop(name, None)
    if message.headers.get("expires"):
        message.properties.pop("expiration", None)
    serialized: bytes = message._serialize_properties()
    return serialized


def json_without_identity(envelope: bytes) -> bytes:
    """The same JSON without the two headers that celery_eda adds, and that time to live.

    And without the tag that each delivery has of its own.
    """
    message = json.loads(envelope)
    assert json.dumps(message).encode() == envelope, "json reads what it would write"
    for name in (ID_HEADER, REVISION_HEADER):
        message["headers"].pop(name, None)
    if message["headers"].get("expires"):
        message["properties"].pop("expiration", None)
    assert message["properties"].pop("delivery_tag"), "acknowledged by this"
    return json.dumps(message).encode()


def arrived_in_rabbitmq(url: str, queues: list[str]) -> list[Letter]:
    """Take everything out of *queues*."""
    with Connection(url) as connection:
        channel = connection.channel()
        return [_delivered(queue, each) for queue in queues for each in _emptied(channel, queue)]


def _emptied(channel: Any, queue: str) -> Iterator[amqp.Message]:
    while (message := amqp.Channel.basic_get(channel, queue, no_ack=True)) is not None:
        yield message


def _delivered(queue: str, message: amqp.Message) -> Letter:
    info = message.delivery_info
    return Letter(
        (queue, info["exchange"], info["routing_key"]),
        message._serialize_properties(),
        message.body.encode() if isinstance(message.body, str) else bytes(message.body),
    )


class RedisListener:
    """Everything that arrives in one Redis database, in lists and on channels."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url)
        self._channels = self._client.pubsub(ignore_subscribe_messages=True)
        self._channels.psubscribe(f"/{urlsplit(url).path.strip('/')}.*")
        self._channels.get_message(timeout=5)

    def take(self) -> list[Letter]:
        """Take everything out of the lists, and what was published on channels."""
        return [*self._lists(), *self._heard()]

    def _lists(self) -> Iterator[Letter]:
        for key in sorted(self._client.scan_iter(_type="list")):
            with self._client.pipeline(transaction=True) as pipeline:
                values = pipeline.lrange(key, 0, -1).delete(key).execute()[0]
            for value in reversed(values):
                yield Letter((key.decode(),), value)

    def _heard(self) -> Iterator[Letter]:
        while (heard := self._channels.get_message(timeout=0.05)) is not None:
            if not heard["channel"].endswith((b"celeryev", b"pidbox")):
                yield Letter((heard["channel"].decode(),), heard["data"])

    def close(self) -> None:
        self._channels.close()
        self._client.close()
