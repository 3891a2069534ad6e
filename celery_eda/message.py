"""One complete Celery message as a value.

It is what an outbox row holds, what a dead letter keeps and what the relay sends. The body is
already serialized, so sending it needs no task, no serializer and no application code.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid5

from celery_eda.event import Draft, Event

if TYPE_CHECKING:
    from typing_extensions import Self

ID_HEADER = "eda_id"
REVISION_HEADER = "eda_revision"
ORDER_HEADER = "eda_order"
#: It says that an event is replayed, and that its handler is to publish nothing.
REPLAY_HEADER = "eda_replay"
#: Under this name Celery's request carries a :class:`Wire`; it never leaves the worker.
WIRE = "eda_wire"
#: Under this name it says that the message is ``expired`` or ``revoked``.
VERDICT = "eda_verdict"
#: What Celery would copy from a message's headers to its next attempt, and must not.
HEADERS = (ID_HEADER, REVISION_HEADER, ORDER_HEADER, WIRE, VERDICT)

#: Properties that travel with a message when it is sent again. Its ``expiration`` would let the
#: broker drop it unseen.
PROPERTIES = frozenset(
    (
        *("app_id", "correlation_id", "delivery_mode", "message_id", "priority", "reply_to"),
        *("timestamp", "type", "user_id"),
    )
)

# Namespace of the ids derived for messages that carry none of ours.
_FOREIGN = UUID("6f1c1f5e-3b0c-5e0a-9a52-6b1f6f0f8e11")


@dataclass(frozen=True)
class Identity:
    """What makes two copies on the wire the same message.

    A retry, a repair and a redrive are the next *revision* of the same *id*.
    """

    id: UUID
    revision: int = 0

    @classmethod
    def fresh(cls) -> Identity:
        """An identity that no other message has: a UUID of version 7 (RFC 9562).

        Its time is there for the index's sake, and to be shown; never for order.
        """
        milliseconds = time.time_ns() // 1_000_000
        random = int.from_bytes(os.urandom(10), "big")
        value = milliseconds << 80 | random
        value = value & ~(0xF << 76) | 0x7 << 76
        return cls(UUID(int=value & ~(0x3 << 62) | 0x2 << 62))

    @property
    def published(self) -> datetime | None:
        """When it was made, to the millisecond, by its publisher's clock; None if nobody knows."""
        if self.id.version != 7:
            return None
        return datetime.fromtimestamp((self.id.int >> 80) / 1000, timezone.utc)

    @property
    def next(self) -> Identity:
        """The identity of the next attempt at the same message."""
        return replace(self, revision=self.revision + 1)

    @classmethod
    def of_foreign(cls, task_id: str, retries: int, nesting: int) -> Identity:
        """The identity of a message whose publisher did not give it one.

        Celery reuses ``task_id`` for retries and replacements, so it is told apart by both.
        """
        return cls(uuid5(_FOREIGN, f"{task_id}.{nesting}"), retries)

    @classmethod
    def of_headers(cls, headers: Mapping[str, Any]) -> Identity | None:
        """The identity that this system wrote into *headers*; None if there is none.

        Raises:
            ValueError: the headers are there, but cannot have been written by this system.
        """
        if (text := headers.get(ID_HEADER)) is None:
            return None
        revision = headers.get(REVISION_HEADER, 0)
        if not isinstance(text, str) or type(revision) is not int or not 0 <= revision < 2**31:
            raise ValueError(f"malformed {ID_HEADER} or {REVISION_HEADER} header")
        return cls(UUID(text), revision)

    @property
    def headers(self) -> dict[str, Any]:
        return {ID_HEADER: str(self.id), REVISION_HEADER: self.revision}


@dataclass(frozen=True)
class Lane:
    """The messages that take effect one after the other: those of one key, from one service.

    Attributes:
        source: the publishing service; two databases cannot share a count.
        stream: the task's name.
        key: the ordering key.
    """

    source: str
    stream: str
    key: str


@dataclass(frozen=True)
class Position:
    """The place of a message in its lane.

    Attributes:
        epoch: set by the clock when the count began; a later one begins again with 1.
        number: counts the messages of the lane in the order in which they were committed.
        previous: epoch and number of the last message before this epoch, if that is known.
    """

    lane: Lane
    epoch: int
    number: int
    previous: tuple[int, int] | None = None

    @classmethod
    def of_headers(cls, headers: Mapping[str, Any]) -> Position | None:
        """The position that this system wrote into *headers*; None if the message has none.

        Raises:
            ValueError: the header is there, but cannot have been written by this system.
        """
        if (written := headers.get(ORDER_HEADER)) is None:
            return None
        match written:
            case [str(source), str(stream), str(key), int(epoch), int(number), *previous] if (
                0 < epoch < 2**63 and 0 < number < 2**63 and all(map(_fits, (source, stream, key)))
            ):
                lane = Lane(source, stream, key)
            case _:
                raise ValueError(f"malformed {ORDER_HEADER} header")
        match previous:
            case []:
                return cls(lane, epoch, number)
            case [int(before), int(last)] if 0 <= before < 2**63 and 0 <= last < 2**63:
                return cls(lane, epoch, number, (before, last))
        raise ValueError(f"malformed {ORDER_HEADER} header")

    @classmethod
    def of_event(cls, event: Event) -> Position | None:
        """The position of *event* in its key's order; None if it has none, or nobody knows it.

        Raises:
            ValueError: nobody can have given it such a place.
        """
        return None if event.order is None else cls.of_headers({ORDER_HEADER: list(event.order)})

    @property
    def headers(self) -> dict[str, Any]:
        lane = (self.lane.source, self.lane.stream, self.lane.key)
        return {ORDER_HEADER: [*lane, self.epoch, self.number, *(self.previous or ())]}


def _fits(name: str) -> bool:
    return len(name) <= 255 and len(name.encode(errors="replace")) <= 1020


@dataclass(frozen=True)
class Wire:
    """A message as it came to the worker; its compression is undone."""

    body: bytes
    content_type: str
    content_encoding: str
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]

    @classmethod
    def of(cls, message: Any) -> Wire:
        """That of *message*, kombu's."""
        body, encoding = message.body, message.content_encoding or "utf-8"
        return cls(
            body.encode(encoding) if isinstance(body, str) else bytes(body),
            message.content_type or "",
            encoding,
            message.headers,
            message.properties or {},
        )


@dataclass(frozen=True)
class Encoded:
    """Headers and properties of a message, encoded.

    Attributes:
        headers: as JSON, the way kombu writes it.
        properties: likewise.
        envelope: both as the broker's protocol has them; None if that is left to whoever sends.
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
        queue: name of the queue to declare before sending, or None.
        due: earliest time to send, by the publisher's clock; None for at once.
        preparation: calls on the result backend that have to precede the message.
        lane: whose next number the message gets when it is written to the outbox, or None.
        draft: the event that goes to the event store together with the message, or None.
        encoded: headers and properties once more, if they are encoded already. A message that is
            made of this one has none.
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
    preparation: tuple[tuple[str, Any], ...] = field(default=())
    lane: Lane | None = None
    draft: Draft | None = None
    # Not among the arguments, so that `replace` never hands it on to other headers.
    encoded: Encoded | None = field(default=None, init=False, compare=False, repr=False)

    def knowing(self, encoded: Encoded | None, **changes: Any) -> Message:
        """This message with these *changes*; *encoded* are its headers and properties then."""
        return Message.made({**vars(self), **changes, "encoded": encoded})

    @classmethod
    def made(cls, fields: dict[str, Any]) -> Self:
        """A message with these *fields*, set all at once; it keeps the dictionary.

        That is a tenth of what it takes a frozen dataclass, which makes a call for each of them.
        """
        message = object.__new__(cls)
        object.__setattr__(message, "__dict__", fields)
        return message

    @property
    def envelope(self) -> bytes | None:
        """Headers and properties as the broker's protocol has them, if they are encoded so."""
        return self.encoded.envelope if self.encoded else None

    def whole(self) -> Message:
        """This message itself; of a claimed one, the relay has read a part only."""
        return self

    def at(self, position: Position | None) -> Message:
        """This message at its place in its lane; None if it is to have none."""
        order = position.headers if position else {}
        return replace(self, lane=None, headers={**self.headers, **order})

    def with_body(self, body: bytes, headers: Mapping[str, Any]) -> Message:
        """This message with another body, and the *headers* that describe it."""
        return replace(self, body=body, content_encoding="utf-8", headers=headers)

    @property
    def place(self) -> Position | None:
        """Its place in its lane; None if it has none, or one that nobody can have written."""
        try:
            return Position.of_headers(self.headers)
        except ValueError:
            return None

    def revised(self, **changes: Any) -> Message:
        """The next revision of this message: a retry, a repair or a redrive, in the same place."""
        identity = self.identity.next
        headers = {**changes.pop("headers", self.headers), **identity.headers}
        return replace(self, identity=identity, headers=headers, **changes)
