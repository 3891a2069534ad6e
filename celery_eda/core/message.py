"""One complete Celery message as a value.

Outbox rows and dead letters store such values, and the relay sends them. The body is already
serialized, so sending it needs no task, no serializer and no application code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from celery_eda.core.event import EventAppend
from celery_eda.core.identity import Identity, Lane, Position

if TYPE_CHECKING:
    from typing_extensions import Self

#: The only header of a message whose headers cannot be decoded: the error, and the bytes in Base64.
UNREADABLE = "eda_unreadable"
#: Properties that travel with a message when it is sent again. ``expiration`` does not: the broker
#: would drop the message silently. Nor does ``user_id``: RabbitMQ refuses that of another user.
PROPERTIES = frozenset(
    {
        "app_id",
        "correlation_id",
        "delivery_mode",
        "message_id",
        "priority",
        "reply_to",
        "timestamp",
        "type",
    }
)
#: Headers in which two messages with the same task id differ, unless they are copies.
TOLD_APART_BY = ("origin", "eta", "expires")


@dataclass(frozen=True)
class Wire:
    """A message as the worker received it, with its body decompressed."""

    body: bytes
    content_type: str
    content_encoding: str
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]

    @classmethod
    def of(cls, message: Any) -> Wire:
        """The wire form of kombu's *message*."""
        body, encoding = message.body, message.content_encoding or "utf-8"
        return cls(
            body.encode(encoding) if isinstance(body, str) else bytes(body),
            message.content_type or "",
            encoding,
            message.headers,
            message.properties or {},
        )

    @property
    def foreign_identity(self) -> Identity:
        """The identity of a message whose publisher did not give it one.

        Copies have the same one. A publisher may use a task id again, for a job of every night,
        say, so everything in which its next message can differ is part of the identity: arguments,
        times, and the process that published it.
        """
        headers, properties = self.headers, self.properties
        told = [headers.get(name) for name in TOLD_APART_BY] + [properties.get("reply_to")]
        digest = sha256(self.body)
        digest.update(
            json.dumps([each if isinstance(each, str) else None for each in told]).encode()
        )
        return Identity.of_foreign(
            headers["id"],
            headers.get("retries") or 0,
            headers.get("replaced_task_nesting") or 0,
            digest.hexdigest(),
        )


@dataclass(frozen=True)
class Encoded:
    """Headers and properties of a message, encoded.

    Attributes:
        headers: as JSON, the way kombu writes it.
        properties: likewise.
        envelope: both in the broker's protocol; None if the sender encodes them.
    """

    headers: str
    properties: str
    envelope: bytes | None


@dataclass(frozen=True)
class Message:
    """A message, ready to send.

    Attributes:
        identity: id and revision; also in ``headers``.
        task: the task's name.
        body: the serialized (and, if asked for, compressed) body.
        headers: the AMQP headers, JSON-like values plus dates, decimals and UUIDs.
        properties: the other AMQP properties, as :meth:`kombu.Producer.publish` takes them.
        queue: name of the queue, or of the exchange, to declare before sending, or None.
        due: earliest time to send, by the publisher's clock; None for at once.
        prerequisites: calls on the result backend that have to precede the message.
        lane: the lane whose next number the message gets when it is written to the outbox, or None.
        event_append: the event to append to the event store together with the message, or None.
        encoded: headers and properties once more, if they are encoded already. A message derived
            from this one has none.
    """

    identity: Identity
    task: str
    body: bytes
    content_type: str
    content_encoding: str
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    exchange: str
    routing_key: str
    queue: str | None = None
    due: datetime | None = None
    prerequisites: tuple[tuple[str, Any], ...] = field(default=())
    lane: Lane | None = None
    event_append: EventAppend | None = None
    # Not an argument, so that `replace` never copies it to a message with other headers.
    encoded: Encoded | None = field(default=None, init=False, compare=False, repr=False)

    def with_encoded(self, encoded: Encoded | None, **changes: Any) -> Message:
        """This message with these *changes*, and its headers and properties as *encoded*."""
        return Message.from_fields({**vars(self), **changes, "encoded": encoded})

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """A message with these *fields*. The message keeps the dictionary itself, not a copy.

        This takes a tenth of the time of the constructor of a frozen dataclass, which calls
        ``object.__setattr__`` for each field.
        """
        message = object.__new__(cls)
        object.__setattr__(message, "__dict__", fields)
        return message

    @property
    def envelope(self) -> bytes | None:
        """Headers and properties in the broker's protocol; None if they are not encoded yet."""
        return self.encoded.envelope if self.encoded else None

    def whole(self) -> Message:
        """This message itself. A claimed message reads its missing parts here."""
        return self

    def at(self, position: Position | None) -> Message:
        """This message with *position* in its headers; None for a message without an order."""
        order = position.headers if position else {}
        return replace(self, lane=None, headers={**self.headers, **order})

    def with_body(self, body: bytes, headers: Mapping[str, Any]) -> Message:
        """This message with another body, and the *headers* that describe it."""
        return replace(self, body=body, content_encoding="utf-8", headers=headers)

    @property
    def position(self) -> Position | None:
        """The position in the order of its key; None if it has none, or a malformed one."""
        try:
            return Position.of_headers(self.headers)
        except ValueError:
            return None

    def revised(self, **changes: Any) -> Message:
        """The next revision of this message, a retry, repair or redrive, at the same position."""
        identity = self.identity.next
        headers = {**changes.pop("headers", self.headers), **identity.headers}
        return replace(self, identity=identity, headers=headers, **changes)
