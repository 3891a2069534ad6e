"""AMQP frames for many messages, so that one write to the socket sends them all.

What kombu and py-amqp would write, byte for byte; in half their time, since most headers
are the same from message to message. What takes most of it, the headers and properties, can be
encoded beforehand: that is the envelope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from struct import Struct, pack, unpack_from
from typing import Any

from amqp import Message as AMQPMessage
from amqp.exceptions import ContentTooLarge
from amqp.serialization import dumps
from amqp.spec import Basic
from kombu.messaging import Producer

from celery_eda.message import Message
from celery_eda.template import Template
from celery_eda.transports.base import Sendable, publish_with

METHOD, HEADER, BODY = 1, 2, 3
FRAME_OVERHEAD = 8  # bytes around the payload of a frame
FRAME_END = b"\xce"
HEADER_SIZE = 12  # bytes of a header frame before the properties
#: In the first octet of properties: there is a content type, as in all of kombu's.
TYPED = 1 << 7
#: Routes to remember.
MOST_ROUTES = 1000

#: Packs the start of a frame: kind, channel, size of the payload.
_start = Struct(">BHI").pack
#: The same, and the start of the payload of a header: class, weight, size of the body.
_header = Struct(">BHIHHQ").pack


class Frames:
    """Frames to write on the channel *channel_id*."""

    def __init__(self, channel_id: int, frame_max: int) -> None:
        self.size = 0
        self._channel_id = channel_id
        self._room = frame_max - FRAME_OVERHEAD
        self._frames: list[bytes] = []
        #: The method frames of the messages so far, by their route.
        self._methods: dict[tuple[str, str, bool], bytes] = {}

    def add(self, message: Sendable) -> None:
        """Encode *message* as *mandatory*: it comes back if no queue takes it.

        Raises whatever kombu and py-amqp raise if that is impossible.
        """
        body, envelope, immediate = message.body, message.envelope, False
        if not envelope or envelope[0] < TYPED:  # it has none, or one for another broker
            envelope, immediate = _encoded(message)
        size, room = len(body), self._room
        places = range(0, size, room)
        header = HEADER_SIZE + len(envelope)
        if header > room:  # the broker would close the connection
            raise ContentTooLarge(f"{header} bytes of headers; one frame takes {room}.")
        route = message.exchange, message.routing_key, immediate
        method = self._methods.get(route) or self._learn(route)
        start = _header(HEADER, self._channel_id, header, Basic.CLASS_ID, 0, size)
        frames = [method, start, envelope, FRAME_END]
        for at in places:
            part = body[at : at + room]
            frames += (_start(BODY, self._channel_id, len(part)), part, FRAME_END)
        self._frames += frames
        self.size += len(method) + header + size + FRAME_OVERHEAD * (1 + len(places))

    def take(self) -> memoryview:
        """All frames so far; starts anew."""
        taken, self._frames, self.size = b"".join(self._frames), [], 0
        return memoryview(taken)

    def _learn(self, route: tuple[str, str, bool]) -> bytes:
        """The method frame of messages with this *route*."""
        if len(self._methods) >= MOST_ROUTES:
            self._methods.clear()
        exchange, routing_key, immediate = route
        mandatory = True
        arguments: bytes = dumps("Bssbb", (0, exchange, routing_key, mandatory, immediate))
        payload = pack(">HH", *Basic.Publish) + arguments
        frame = _start(METHOD, self._channel_id, len(payload)) + payload + FRAME_END
        self._methods[route] = frame
        return frame


def encode_envelope(message: Message) -> bytes | None:
    """The envelope of *message*; None if it cannot be encoded, or says more than that."""
    try:
        envelope, immediate = _encoded(message)
    except Exception:  # whoever sends it finds out, and says so
        return None
    return None if immediate else envelope


class EnvelopeTemplate:
    """Octets in which the length of the table of headers differs too. See ``transports.base``."""

    def __init__(
        self, message: Message, envelope: bytes, headers: Iterable[str], properties: Iterable[str]
    ) -> None:
        texts = {name: _value(message.headers[name]) for name in headers}
        shorts = {name: _short(message.properties[name]) for name in properties}
        # Before the table of headers: the flags, two short texts, and its length in four bytes.
        table = 2 + len(_short(message.content_type)) + len(_short(message.content_encoding))
        (length,) = unpack_from(">I", envelope, table)
        self._before, rest = envelope[:table], envelope[table + 4 :]
        self._fixed = length - sum(map(len, texts.values()))
        self._texts, self._shorts = tuple(texts), tuple(shorts)
        self._rest = Template(rest, {**texts, **shorts})

    def filled(self, values: Mapping[str, str]) -> bytes:
        texts = {name: _value(values[name]) for name in self._texts}
        length = self._fixed + sum(map(len, texts.values()))
        shorts = {name: _short(values[name]) for name in self._shorts}
        return self._before + pack(">I", length) + self._rest.filled({**texts, **shorts})


class _Encoder:
    """Stands in for a channel, to kombu's producer, which gives each message its properties."""

    def prepare_message(
        self,
        body: bytes,
        priority: int | None,
        content_type: str,
        content_encoding: str,
        headers: Mapping[str, Any],
        properties: Mapping[str, Any],
    ) -> Mapping[str, Any]:
        return {
            "priority": priority,
            "content_type": content_type,
            "content_encoding": content_encoding,
            "application_headers": headers,
            **properties,
        }

    def basic_publish(
        self, message: Mapping[str, Any], immediate: bool, **_: Any
    ) -> tuple[bytes, bool]:
        return _properties(message), immediate


def _encoded(message: Sendable) -> tuple[bytes, bool]:
    """Headers and properties of *message*, and whether it is immediate."""
    encoded: tuple[bytes, bool] = publish_with(_producer, message)
    return encoded


_producer = Producer(_Encoder())


def _properties(properties: Mapping[str, Any]) -> bytes:
    flags, encoded = 0, [b""]
    for flag, name, encode in LAYOUT:
        if (value := properties.get(name)) is not None:
            flags |= flag
            encoded.append(encode(value))
    encoded[0] = pack(">H", flags)
    return b"".join(encoded)


def _short(text: Any) -> bytes:
    encoded: bytes = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return pack("B", len(encoded)) + encoded


_name = lru_cache(maxsize=1024)(_short)


def _table(entries: Mapping[str, Any]) -> bytes:
    encoded = b"".join([_name(name) + _value(value) for name, value in entries.items()])
    return pack(">I", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    kind = type(value)
    if kind is str:
        text: bytes = value.encode("utf-8", "surrogatepass")
        return b"S" + pack(">I", len(text)) + text
    if value is None:
        return b"V"
    if kind is int or kind is bool:
        return _number(value)
    if kind is dict:
        return b"F" + _table(value)
    if kind is list:
        array = b"".join(map(_value, value))
        return b"A" + pack(">I", len(array)) + array
    return _other(value)


def _other(value: Any) -> bytes:
    array_of_one: bytes = dumps("A", ([value],))
    return array_of_one[4:]  # without its length


#: Typed, because True and 1 are equal and not the same.
_number = lru_cache(maxsize=1024, typed=True)(_other)

_ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "s": _short,
    "F": _table,
    "o": lambda value: pack("B", value),
    "L": lambda value: pack(">Q", value),
}
#: Of every property its flag, its name and how to encode it, in py-amqp's order.
LAYOUT = [
    (1 << 15 - place, name, _ENCODERS[kind])
    for place, (name, kind) in enumerate(AMQPMessage.PROPERTIES)
]
