"""One complete Celery message as a value.

It is what an outbox row holds, what a dead letter keeps and what the relay sends. The body is
already serialized, so sending it needs no task, no serializer and no application code.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID, uuid5

ID_HEADER = "eda_id"
REVISION_HEADER = "eda_revision"

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

        Its time is there for the index's sake only, never for order.
        """
        milliseconds = time.time_ns() // 1_000_000
        random = int.from_bytes(os.urandom(10), "big")
        value = milliseconds << 80 | random
        value = value & ~(0xF << 76) | 0x7 << 76
        return cls(UUID(int=value & ~(0x3 << 62) | 0x2 << 62))

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
