"""Messages that are committed and not sent yet.

A row is written in the transaction that published the message and leaves only when the broker
has confirmed that very message.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from json import loads
from typing import Any

from kombu.utils import json
from sqlalchemy import Connection, Row, Table

from celery_eda import redaction
from celery_eda.dialects.base import Dialect
from celery_eda.message import Encoded, Identity, Message

log = logging.getLogger(__name__)

#: Seconds that a row rests which cannot be read.
UNREADABLE_REST = 3600.0
#: The key under which kombu writes the type of what is no JSON.
_TYPE = '"__type__"'


@dataclass(frozen=True)
class Pending:
    """A claimed row.

    Attributes:
        id: of the row, in the order of writing (not of committing).
        attempts: how often the broker refused it before.
    """

    id: int
    message: Message
    attempts: int


@dataclass(frozen=True)
class Outbox:
    """The outbox of one database.

    Attributes:
        seal: encodes headers and properties for the broker, which spares whoever sends a message
            to read and encode them; None leaves it to them.
    """

    table: Table
    dialect: Dialect
    seal: Callable[[Message], bytes | None] = lambda _: None

    def add(self, connection: Connection, messages: Sequence[Message]) -> list[int]:
        """Write *messages* in one go; returns the ids of the rows, in the same order."""
        rows = [{**to_row(each), "envelope": each.envelope or self.seal(each)} for each in messages]
        return self.dialect.add(connection, self.table, rows)

    def encode(self, message: Message) -> Encoded:
        """Headers and properties of *message*, as its row is to have them."""
        return Encoded(*_texts(message), self.seal(message))

    def claim(
        self,
        connection: Connection,
        owner: str,
        limit: int,
        ids: Sequence[int] = (),
        after: int = 0,
    ) -> list[Pending]:
        """Take rows that are due; nobody else gets them until they are settled or we die.

        Rows up to the id *after*, where others are at work, may be left out.
        A row that cannot be read is put aside with the reason, so that it holds up no others.
        """
        rows = self.dialect.claim(connection, self.table, owner, limit, ids, after)
        pending = (self._read(connection, owner, row) for row in rows)
        return [each for each in pending if each]

    def _read(self, connection: Connection, owner: str, row: Row[Any]) -> Pending | None:
        try:
            return Pending(row.id, from_row(row), row.attempts)
        except Exception as error:
            why = f"This row cannot be read: {error!r}"
            log.error("outbox row %s of %s rests: %s", row.id, row.task, why)
            self.postpone(connection, owner, row.id, UNREADABLE_REST, why)
            return None

    def clear(self, connection: Connection, owner: str, ids: Sequence[int]) -> int:
        """Delete what the broker confirmed; returns how many rows were still the owner's.

        The others have been taken over by somebody else, and stay.
        """
        return self.dialect.clear(connection, self.table, owner, ids) if ids else 0

    def postpone(
        self,
        connection: Connection,
        owner: str,
        row_id: int,
        delay: float,
        why: str,
        *,
        charged: bool = True,
    ) -> None:
        """Try again in *delay* seconds; *charged* if the broker refused this very message."""
        kept = redaction.storable(redaction.redact(why))
        self.dialect.postpone(connection, self.table, owner, row_id, delay, kept, charged=charged)

    def release(self, connection: Connection, owner: str, ids: Sequence[int]) -> None:
        """Give rows back as they were: the broker was away, which is not their fault."""
        if ids:
            self.dialect.release(connection, self.table, owner, ids)


def to_row(message: Message) -> dict[str, Any]:
    """The columns of *message*; ``delay`` is in seconds from now, None for at once."""
    headers, properties = _texts(message)
    return {
        "message_id": message.identity.id,
        "revision": message.identity.revision,
        "task": message.task,
        "queue": message.queue,
        "exchange": message.exchange,
        "routing_key": message.routing_key,
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        "headers": headers,
        "properties": properties,
        "body": message.body,
        "preparation": json.dumps(message.preparation) if message.preparation else None,
        "delay": _seconds_until(message.due),
    }


def from_row(row: Row[Any]) -> Message:
    """The message in *row*, as it was captured.

    Of one that has an envelope, headers and properties are read only if somebody asks for them.
    """
    envelope = getattr(row, "envelope", None)
    encoded = Encoded(row.headers, row.properties, envelope and bytes(envelope))
    read: Callable[[str], Mapping[str, Any]] = Unread if encoded.envelope else _loads
    preparation = json.loads(row.preparation) if row.preparation else ()
    return Message.made(
        {
            "identity": Identity(row.message_id, row.revision),
            "task": row.task,
            "body": bytes(row.body),
            "content_type": row.content_type,
            "content_encoding": row.content_encoding,
            "headers": read(row.headers),
            "properties": read(row.properties),
            "exchange": row.exchange,
            "routing_key": row.routing_key,
            "queue": row.queue,
            "preparation": tuple((name, arguments) for name, arguments in preparation),
            "encoded": encoded,
        }
    )


class Unread(Mapping[str, Any]):
    """Headers or properties as they are stored, read when somebody asks for them."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def _read(self) -> dict[str, Any]:
        return _loads(self._text)

    def __getitem__(self, name: str) -> Any:
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def _loads(text: str) -> dict[str, Any]:
    # Only what is no JSON has a type written beside it, and looking for one takes its time.
    hook = _typed if _TYPE in text else None
    read: dict[str, Any] = loads(text, object_hook=hook)
    return read


def _texts(message: Message) -> tuple[str, str]:
    """Headers and properties of *message* as JSON."""
    if message.encoded:
        return message.encoded.headers, message.encoded.properties
    return _dumps(message.headers), _dumps(message.properties)


def _dumps(mapping: Mapping[str, Any]) -> str:
    return str(json.dumps(dict(mapping)))


def _typed(value: dict[str, Any]) -> Any:
    """A date or the like that kombu has written, or a user's dictionary that only looks so."""
    try:
        return json.object_hook(value)
    except Exception:
        return value


def _seconds_until(due: datetime | None) -> float | None:
    """Seconds from now until *due*, both by this machine's clock, so that its error cancels out.

    The database counts them with its own clock from the moment of writing.
    """
    if due is None:
        return None
    return max(0.0, (due - datetime.now(timezone.utc)).total_seconds())
