"""Messages that could not be sent or handled, kept whole and visible.

A dead letter is written in the transaction that takes the message off the road, so it is always
in exactly one place. It is *open* until somebody redrives, skips or discards it, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Row, Table, func, insert, or_, update
from sqlalchemy import select as select_rows

from celery_eda import message_rows, redaction
from celery_eda.arguments import Arguments
from celery_eda.dialects.base import Dialect
from celery_eda.error_text import text_of, traceback_of
from celery_eda.errors import UnreadableBody
from celery_eda.limits import NAME_LENGTH
from celery_eda.message import Message


class Reason(str, Enum):
    """Why a message became a dead letter."""

    failed = "failed"
    exhausted = "retries exhausted"
    rejected = "rejected"
    lost_worker = "lost worker"
    malformed = "malformed"
    unsendable = "unsendable"
    out_of_sequence = "out of sequence"
    undecodable = "undecodable"
    unknown_task = "unknown task"
    too_large = "too large"
    expired = "expired"
    revoked = "revoked"
    time_limit = "time limit"


class State(str, Enum):
    """What became of a dead letter.

    ``open``: nothing yet. ``redriven``: its message was sent again, as its next revision.
    ``skipped``: it was given up, and those behind it in its key's order go on. ``discarded``: it
    was given up.
    """

    open = "open"
    redriven = "redriven"
    skipped = "skipped"
    discarded = "discarded"


@dataclass(frozen=True)
class Letter:
    """A dead letter.

    Attributes:
        message: the whole message, as it came.
        consumer: whose message it was; None if it never reached one.
        reason: one of :class:`Reason`, or what a newer version writes there.
        error_type, error, traceback: of the last failure, bounded and without secrets.
        attempts: how many there were.
        first_at: when the first attempt ended.
        at: when it became a dead letter.
        state: one of :class:`State`.
        key: its ordering key.
        correlation_id: id of the task that all this began with.
        causation_id: id of the task that published it.
    """

    id: int
    message: Message
    consumer: str | None
    reason: str
    error_type: str | None
    error: str | None
    traceback: str | None
    attempts: int
    first_at: datetime | None
    at: datetime
    state: str
    key: str | None
    correlation_id: str | None
    causation_id: str | None

    @property
    def is_open(self) -> bool:
        return self.state == State.open.value


@dataclass(frozen=True)
class Filter:
    """Which dead letters; what is None is not asked for.

    Attributes:
        ids: of these alone.
        queue: name of the queue, or the routing key.
        error_type: name of the exception's class.
        key: the ordering key.
        message_id: every letter that one message has become.
        since, until: when it became a dead letter, the end excluded.
    """

    ids: tuple[int, ...] | None = None
    task: str | None = None
    queue: str | None = None
    error_type: str | None = None
    key: str | None = None
    reason: str | None = None
    state: str | None = None
    message_id: UUID | None = None
    since: datetime | None = None
    until: datetime | None = None

    def conditions(self, table: Table) -> Iterator[ColumnElement[bool]]:
        """What a row has to fulfil."""
        columns = table.c
        if self.ids is not None:
            yield columns.id.in_(self.ids)
        if self.queue is not None:
            yield or_(columns.queue == self.queue, columns.routing_key == self.queue)
        if self.key is not None:
            yield columns.ordering_key == self.key
        for name in ("task", "error_type", "reason", "state", "message_id"):
            if (value := getattr(self, name)) is not None:
                yield columns[name] == value
        if self.since is not None:
            yield columns.at >= _in_utc(self.since)
        if self.until is not None:
            yield columns.at < _in_utc(self.until)


@dataclass(frozen=True)
class DeadLetters:
    """The dead letters of one database."""

    table: Table
    dialect: Dialect

    def add(
        self,
        connection: Connection,
        message: Message,
        reason: Reason,
        *,
        error: BaseException | str,
        attempts: int,
        consumer: str | None = None,
        first_at: datetime | None = None,
    ) -> int:
        """Keep *message*; returns the id of the letter.

        The *consumer* is None if it never reached one; *first_at* is when its first attempt
        ended, now if None.
        """
        secrets = _secrets(message)
        place = message.place
        result = connection.execute(
            insert(self.table).values(
                **_columns(message),
                created_at=self.dialect.now(),
                consumer=consumer,
                reason=reason.value,
                error_type=type(error).__qualname__[:NAME_LENGTH]
                if isinstance(error, BaseException)
                else None,
                error=text_of(error, secrets),
                traceback=traceback_of(error, secrets),
                attempts=attempts,
                at=self.dialect.now(),
                state=State.open.value,
                first_at=first_at or self.dialect.now(),
                ordering_key=place and place.lane.key,
                correlation_id=_name(message.headers, "root_id"),
                causation_id=_name(message.headers, "parent_id"),
            )
        )
        row_id: int = result.inserted_primary_key[0]  # type: ignore[index]  # it has one
        return row_id

    def find(self, connection: Connection, id: int, *, lock: bool = False) -> Letter | None:
        """The letter with this *id*.

        With *lock* nobody else changes it until this transaction ends; another who locks it
        waits, and sees what became of it.
        """
        table = self.table
        if lock:
            # Written, not only locked: SQLite knows no other lock on a row.
            same = update(table).where(table.c.id == id).values(state=table.c.state)
            connection.execute(same)
        query = select_rows(table).where(table.c.id == id)
        # A locking read: at REPEATABLE READ MariaDB would show the row as it was before.
        row = connection.execute(query.with_for_update() if lock else query).one_or_none()
        return None if row is None else _from_row(row)

    def select(
        self, connection: Connection, which: Filter, limit: int = 100, after: int = 0
    ) -> Sequence[Letter]:
        """At most *limit* letters that *which* asks for, oldest first, with ids above *after*."""
        query = (
            select_rows(self.table)
            .where(self.table.c.id > after, *which.conditions(self.table))
            .order_by(self.table.c.id)
            .limit(limit)
        )
        return [_from_row(row) for row in connection.execute(query)]

    def count(self, connection: Connection, which: Filter) -> int:
        """How many letters *which* asks for."""
        query = select_rows(func.count()).select_from(self.table)
        return connection.execute(query.where(*which.conditions(self.table))).scalar_one()

    def change(self, connection: Connection, id: int, message: Message) -> None:
        """Put *message* in the place of the one that the letter holds."""
        values = _columns(message)
        connection.execute(update(self.table).where(self.table.c.id == id).values(values))

    def close(self, connection: Connection, id: int, state: State) -> None:
        """Note what became of an open letter, which this transaction has locked."""
        connection.execute(
            update(self.table).where(self.table.c.id == id).values(state=state.value)
        )


def _secrets(message: Message) -> list[str]:
    """The secret arguments of *message*, by the names it gives them or the task in hand does."""
    try:
        named = redaction.secrets_of(Arguments.of(message).kwargs)
    except UnreadableBody:
        named = []
    return [*named, *redaction.secrets_in_hand()]


def _columns(message: Message) -> dict[str, Any]:
    values = message_rows.to_row(message)
    del values["delay"]
    return values


def _from_row(row: Row[Any]) -> Letter:
    return Letter(
        id=row.id,
        message=message_rows.from_row(row),
        consumer=row.consumer,
        reason=row.reason,
        error_type=row.error_type,
        error=row.error,
        traceback=row.traceback,
        attempts=row.attempts,
        first_at=row.first_at and _aware(row.first_at),
        at=_aware(row.at),
        state=row.state,
        key=row.ordering_key,
        correlation_id=row.correlation_id,
        causation_id=row.causation_id,
    )


def _aware(moment: datetime) -> datetime:
    """*moment* with its time zone, which not every database keeps; the clocks are UTC."""
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _in_utc(moment: datetime) -> datetime:
    """*moment* as every database compares it; without a time zone it is meant in local time."""
    return moment.astimezone(timezone.utc)


def _name(headers: Mapping[str, Any], name: str) -> str | None:
    value = headers.get(name)
    return redaction.storable(value[:NAME_LENGTH])[:NAME_LENGTH] if isinstance(value, str) else None
