"""Consuming from RabbitMQ, including messages whose properties the client library cannot read.

RabbitMQ accepts properties that py-amqp cannot decode: names that are not UTF-8, dates after the
year 9999, tables nested a thousand deep. Py-amqp decodes them before any callback, and its
exception would end one worker after the other. Here such a message arrives with its properties
undecoded, in one header.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from struct import pack, unpack_from
from typing import Any

from amqp.method_framing import frame_handler
from amqp.serialization import decode_properties_basic, dumps
from kombu.transport import pyamqp

from celery_eda.core.message import UNREADABLE

#: The type of a frame with a message's properties.
HEADER = 2
#: Octets in such a frame before the properties: class, weight and body size.
BEFORE_PROPERTIES = 12
#: The flags of a stand-in's properties: only the table of headers.
ONLY_HEADERS = 0x2000


def tolerant(connection: Any, callback: Callable[..., Any]) -> Callable[[Any], bool]:
    """Py-amqp's frame handler, which here puts undecodable properties into one header."""
    read = frame_handler(connection, callback)

    def on_frame(frame: Any) -> bool:
        try:
            return bool(read(frame))
        except Exception:
            kind, channel, buffer = frame
            if kind != HEADER or not (why := _unreadable(buffer)):
                raise
            # The first attempt has set nothing but the body size, and that is the same.
            return bool(read((kind, channel, _stand_in(buffer, why))))

    return on_frame


def _unreadable(buffer: Any) -> str | None:
    """The reason why the properties in *buffer* cannot be decoded; None if they can."""
    try:
        decode_properties_basic(buffer, BEFORE_PROPERTIES)
    except Exception as error:
        return f"{type(error).__name__} in the properties"
    return None


def _stand_in(buffer: Any, why: str) -> bytes:
    """The frame in *buffer* with the octets of its properties as a header, in base 64."""
    octets = bytes(buffer[BEFORE_PROPERTIES:])
    headers = {UNREADABLE: [why, b64encode(octets).decode()]}
    (class_id, size) = unpack_from(">HxxQ", buffer, 0)
    table: bytes = dumps("F", [headers])
    return pack(">HxxQH", class_id, size, ONLY_HEADERS) + table


class Connection(pyamqp.Connection):
    """Kombu's connection, with the tolerant frame handler."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"frame_handler": tolerant, **options})


class Transport(pyamqp.Transport):
    """Kombu's transport, with the tolerant connection."""

    Connection = Connection


class SSLTransport(pyamqp.SSLTransport):
    """The same over TLS."""

    Connection = Connection
