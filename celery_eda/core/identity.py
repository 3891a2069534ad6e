"""Identity and order of a message: the headers that tell copies and successors apart.

Both travel as headers. Headers that this system cannot have written are refused.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any
from uuid import UUID, uuid5

from celery_eda.core.event import Event
from celery_eda.core.limits import KEY_BYTES, LARGEST, fits

ID_HEADER = "eda_id"
REVISION_HEADER = "eda_revision"
ORDER_HEADER = "eda_order"
#: The previous epoch and number of a position that waits for no message that has not come.
ANY = (0, 0)
#: Milliseconds by which an epoch may be ahead of our clock. One that no clock has reached yet
#: would make all later messages of its key come too late, for ever.
AHEAD = 86_400_000
#: Marks a replayed event, whose handler must not publish anything.
REPLAY_HEADER = "eda_replay"
#: Attribute of Celery's request with the :class:`celery_eda.core.message.Wire`; never sent.
WIRE = "eda_wire"
#: Attribute of Celery's request: ``expired`` or ``revoked`` if the message must not be handled.
VERDICT = "eda_verdict"
#: Key in the delivery info: True if the broker has kept the message until its ETA.
WAITED = "eda_waited"
#: Attribute of Celery's request: the parked messages that may follow this one; never sent.
DRAIN = "eda_drain"
#: Headers that Celery must not copy from a message to its next attempt.
HEADERS = (ID_HEADER, REVISION_HEADER, ORDER_HEADER, WIRE, VERDICT, DRAIN)

# Namespace of the ids derived for messages that carry none of ours.
_FOREIGN = UUID("6f1c1f5e-3b0c-5e0a-9a52-6b1f6f0f8e11")


@dataclass(frozen=True)
class Identity:
    """Id and revision of a message; two copies on the wire with the same identity are one message.

    A retry, a repair and a redrive are the next *revision* of the same *id*.
    """

    id: UUID
    revision: int = 0

    @classmethod
    def fresh(cls) -> Identity:
        """A unique identity, revision 0: a UUID of version 7 (RFC 9562).

        Its time keeps inserts into an index local and can be shown; it never decides order.
        """
        milliseconds = time.time_ns() // 1_000_000
        random = int.from_bytes(os.urandom(10), "big")
        value = milliseconds << 80 | random
        value = value & ~(0xF << 76) | 0x7 << 76
        return cls(UUID(int=value & ~(0x3 << 62) | 0x2 << 62))

    @property
    def published(self) -> datetime | None:
        """Time of publishing in UTC, to the millisecond, by the publisher's clock.

        None for an id that is no UUID of version 7, or of a year that has no date.
        """
        if self.id.version != 7:
            return None
        try:
            return datetime.fromtimestamp((self.id.int >> 80) / 1000, timezone.utc)
        except (ValueError, OverflowError):  # made by somebody else: the year 10889, say
            return None

    @property
    def next(self) -> Identity:
        """The identity of the next attempt at the same message."""
        return replace(self, revision=self.revision + 1)

    @classmethod
    def of_foreign(
        cls, task_id: str, retries: int, nesting: int, contents: str | None = None
    ) -> Identity:
        """The identity of a message whose publisher did not give it one.

        Celery reuses ``task_id`` for retries and replacements, so both counts are part of it.
        Publishers reuse it too: *contents* tells their messages apart.
        """
        names = [task_id, str(nesting), *([contents] if contents else [])]
        return cls(uuid5(_FOREIGN, ".".join(names)), retries)

    @classmethod
    def of_headers(cls, headers: Mapping[str, Any]) -> Identity | None:
        """The identity that this system wrote into *headers*; None if there is none.

        Raises:
            ValueError: the headers are present, but malformed.
        """
        if (text := headers.get(ID_HEADER)) is None:
            return None
        revision = headers.get(REVISION_HEADER, 0)
        if not isinstance(text, str) or type(revision) is not int or not 0 <= revision <= LARGEST:
            raise ValueError(f"malformed {ID_HEADER} or {REVISION_HEADER} header")
        return cls(UUID(text), revision)

    @property
    def headers(self) -> dict[str, Any]:
        return {ID_HEADER: str(self.id), REVISION_HEADER: self.revision}


@dataclass(frozen=True)
class Lane:
    """The messages of one key from one service, which take effect one after the other.

    Attributes:
        source: the publishing service; two databases cannot share a count.
        scope: messages that share one count: a task's name, or ``<category>.#`` for events.
        key: the ordering key.
    """

    source: str
    scope: str
    key: str

    @property
    def fits(self) -> bool:
        """True if the columns of all tables hold the names of this lane."""
        return fits(self.source, KEY_BYTES) and fits(self.scope) and fits(self.key, KEY_BYTES)


@dataclass(frozen=True)
class Position:
    """Position of a message in its lane.

    Attributes:
        epoch: milliseconds of the clock when the count began; each epoch counts from 1.
        number: counts the messages of the lane in the order of their commits.
        previous: epoch and number of the last message before this epoch; None if unknown, ``ANY``
            if the producer has been restored, so that the messages before it may be lost.
    """

    lane: Lane
    epoch: int
    number: int
    previous: tuple[int, int] | None = None

    @classmethod
    def of_headers(cls, headers: Mapping[str, Any]) -> Position | None:
        """The position that this system wrote into *headers*; None if there is none.

        Raises:
            ValueError: the header is present, but malformed.
        """
        if (written := headers.get(ORDER_HEADER)) is None:
            return None
        match written:
            case [str(source), str(scope), str(key), int(epoch), int(number), *previous] if (
                0 < epoch <= time.time() * 1000 + AHEAD
                and 0 < number < 2**63
                and Lane(source, scope, key).fits
            ):
                lane = Lane(source, scope, key)
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
        """The position of *event* in its key's order; None if it has none.

        Raises:
            ValueError: the event's order is malformed.
        """
        return None if event.order is None else cls.of_headers({ORDER_HEADER: list(event.order)})

    @property
    def headers(self) -> dict[str, Any]:
        lane = (self.lane.source, self.lane.scope, self.lane.key)
        return {ORDER_HEADER: [*lane, self.epoch, self.number, *(self.previous or ())]}
