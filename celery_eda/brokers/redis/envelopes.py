"""Kombu's payload for a list of Redis, prepared when a message is captured.

Kombu encodes a message as one JSON text that contains the body and a delivery tag. The envelope is
that text without those two, and the message's priority; the transport inserts them.
"""

from __future__ import annotations

from binascii import b2a_base64
from collections.abc import Iterable, Mapping
from itertools import count
from json.encoder import encode_basestring_ascii
from typing import Any
from uuid import uuid4

from kombu.messaging import Producer
from kombu.transport.redis import Channel
from kombu.utils.json import dumps

from celery_eda.brokers.base import Sendable, publish_with
from celery_eda.core.message import Message
from celery_eda.core.template import Template

#: Kombu's default encoding of the body, which a transport option may change.
BODY_ENCODING = "base64"
#: Separates the parts of an envelope. JSON text never contains this octet.
GAP = b"\0"
#: The first octet of an envelope.
START = ord("{")
#: Number of cached list names.
MOST_LISTS = 1000

# Replaces the body and the tag while kombu makes the text; no message can contain it.
_MARK = uuid4().hex


def list_of(channel: Any, queue: str, priority: int) -> str:
    """The list in which kombu's *channel* keeps the messages of *queue* with this *priority*."""
    name: str = channel._q_for_pri(queue, priority)
    return name


class Payloads:
    """Makes payloads from envelopes, for the lists of one of kombu's channels."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._is_usual = channel.body_encoding == BODY_ENCODING
        # Unique for each delivery: one of kombu's tags, with a number appended.
        self._tag = channel._next_delivery_tag().encode()
        self._numbers = count(1)
        #: List names, by queue and priority.
        self._lists: dict[tuple[str, bytes], str] = {}

    def of(self, message: Sendable) -> tuple[str, bytes] | None:
        """The list and the payload of *message*; None if kombu has to make the payload."""
        envelope, queue = message.envelope, message.routing_key
        if not envelope or envelope[0] != START:  # no envelope, or one for another broker
            return None
        # For a queue that expires, kombu also renews the expiry with each message.
        if not self._is_usual or queue in self._channel._expires:
            return None
        before, between, after, priority = envelope.split(GAP)
        body = b2a_base64(message.body, newline=False)
        tag = b"%s.%d" % (self._tag, next(self._numbers))
        payload = b"".join((before, body, between, tag, after))
        route = queue, priority
        return self._lists.get(route) or self._learn(route), payload

    def _learn(self, route: tuple[str, bytes]) -> str:
        """The list of a queue and priority; caches it."""
        if len(self._lists) >= MOST_LISTS:
            self._lists.clear()
        queue, priority = route
        key = list_of(self._channel, queue, int(priority))
        self._lists[route] = key
        return key


class EnvelopeTemplate:
    """A JSON text with slots for the values that differ. See ``brokers.base``."""

    def __init__(
        self, message: Message, envelope: bytes, headers: Iterable[str], properties: Iterable[str]
    ) -> None:
        values = {name: message.headers[name] for name in headers}
        values |= {name: message.properties[name] for name in properties}
        self._template = Template(envelope, {name: _text(each) for name, each in values.items()})

    def filled(self, values: Mapping[str, str]) -> bytes:
        return self._template.filled({name: _text(values[name]) for name in self._template.names})


def encode_envelope(message: Message) -> bytes | None:
    """The envelope of *message*; None if it cannot be encoded, or has to be routed by bindings."""
    if message.exchange:
        return None
    try:
        envelope: bytes | None = publish_with(_producer, message)
    except Exception:  # the transport will fail likewise, and report the error
        return None
    return envelope


class _Encoder(Channel):
    """Kombu's channel without a server: returns the envelope of what it would push."""

    connection = None

    def __init__(self) -> None: ...

    def __del__(self) -> None: ...

    def _next_delivery_tag(self) -> str:
        return _MARK

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> bytes | None:
        priority = self._get_message_priority(message)
        parts = dumps({**message, "body": _MARK}).encode().split(_MARK.encode())
        return GAP.join((*parts, b"%d" % priority)) if len(parts) == 3 else None


_producer = Producer(_Encoder())


def _text(value: str) -> bytes:
    return encode_basestring_ascii(value).encode()
