"""The event store: every event that this service has emitted.

An event is appended in the transaction that emits it. The events of one category and key are a
stream, and its versions follow the order of the commits. A position orders all events of the store.
Positions are assigned to committed events only, when a reader asks for them; so a reader that
follows the positions never misses the event of a long transaction, and sees no event twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any
from uuid import UUID

from kombu.utils import json
from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Insert,
    Row,
    Select,
    Table,
    bindparam,
    delete,
    exists,
    func,
    insert,
    select,
    update,
)

from celery_eda.core.clock import utc
from celery_eda.core.event import Event, EventAppend
from celery_eda.databases import Dialect
from celery_eda.errors import InvalidEvent, VersionConflict

#: Events to read, or to assign positions to, in one statement.
BATCH = 1000


@dataclass(frozen=True)
class EventFilter:
    """Conditions on events, all of which have to hold; None, or an empty sequence, matches all.

    Attributes:
        category: the first word of the type.
        stream: ``<category>.<key>``.
        types: exact types.
        since, until: time of the append, by the database's clock; *since* is inclusive, *until*
            exclusive. A naive datetime is UTC.
    """

    category: str | None = None
    stream: str | None = None
    types: Sequence[str] = ()
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True)
class EventStore:
    """The event store of one database."""

    table: Table
    dialect: Dialect

    def append(self, connection: Connection, appends: Sequence[EventAppend]) -> None:
        """Append events that have their versions already.

        Raises:
            VersionConflict: a stream is not at the expected version; the transaction has to be
                rolled back.
        """
        for append in appends:
            event = append.event
            if append.expected is not None and event.version != append.expected + 1:
                assert event.stream is not None, "an expected version needs a key"
                assert event.version is not None, "its sequence has numbered the event"
                raise VersionConflict(event.stream, append.expected, event.version - 1)
        if appends:
            connection.execute(self._appending, [_to_row(append.event) for append in appends])

    def find(self, connection: Connection, event_id: UUID) -> Event | None:
        """Return the event with this id; None if there is none."""
        query = select(self.table).where(self.table.c.event_id == event_id)
        row = connection.execute(query).one_or_none()
        return None if row is None else _from_row(row)

    def stream(
        self,
        connection: Connection,
        stream: str,
        *,
        after: int = 0,
        at: datetime | None = None,
    ) -> Iterator[Event]:
        """Yield the events of *stream* by version.

        Args:
            connection: to read with, in pages of 1000 events.
            stream: ``<category>.<key>``.
            after: a version; only later events are read.
            at: a time; only events appended until then are read.
        """
        columns = self.table.c
        query = select(self.table).where(*self._of_stream(stream)).order_by(columns.version)
        if at is not None:
            query = query.where(columns.at <= utc(at))
        while True:
            rows = connection.execute(query.where(columns.version > after).limit(BATCH)).all()
            yield from map(_from_row, rows)
            if len(rows) < BATCH:
                return
            after = rows[-1].version

    def read(
        self,
        connection: Connection,
        wanted: EventFilter | None = None,
        *,
        after: int = 0,
        limit: int = BATCH,
    ) -> list[Event]:
        """Return up to *limit* events by position, later than the position *after*.

        Events without a position are not included: see :meth:`assign_positions`.
        """
        position = self.table.c.position
        query: Select[Any] = select(self.table).where(position > after).order_by(position)
        query = query.where(*self._conditions(wanted or EventFilter())).limit(limit)
        return [_from_row(row) for row in connection.execute(query)]

    def follow(
        self, engine: Engine, wanted: EventFilter | None = None, *, after: int = 0
    ) -> Iterator[Event]:
        """Assign positions, then yield all events by position, later than the position *after*.

        Each page of 1000 events is read in a transaction of its own.
        """
        self.assign_positions(engine)
        while True:
            with engine.connect() as connection:
                page = self.read(connection, wanted, after=after)
            yield from page
            if not page:
                return
            after = page[-1].position or after

    def assign_positions(self, engine: Engine) -> int:
        """Assign positions to the committed events without one, in short transactions.

        A lock makes these transactions run one after the other. So a reader that sees a position
        can see all events with smaller positions too.

        Returns:
            The number of events that got a position.
        """
        total = 0
        while self._lacks_positions(engine):
            with (
                engine.connect() as connection,
                self.dialect.exclusive(connection, f"{self.table.fullname}.position"),
            ):
                assigned = self._assign(connection)
                connection.commit()
            total += assigned
        return total

    def delete(self, connection: Connection, wanted: EventFilter, up_to: int, limit: int) -> int:
        """Delete up to *limit* of the *wanted* events with positions up to and including *up_to*.

        The event with the highest position of the store stays: the next position follows it.

        Returns:
            The number of events deleted.
        """
        position = self.table.c.position
        last = connection.scalar(select(func.max(position))) or 0
        conditions = self._conditions(wanted)
        ids = select(self.table.c.id).where(position <= up_to, position < last, *conditions)
        found = list(connection.scalars(ids.order_by(position).limit(limit)))
        if found:
            connection.execute(delete(self.table).where(self.table.c.id.in_(found)))
        return len(found)

    def _lacks_positions(self, engine: Engine) -> bool:
        """True if an event has no position; read without the lock, which stops SQLite's writers."""
        with engine.connect() as connection:
            some = exists().where(self.table.c.position.is_(None))
            return bool(connection.scalar(select(some)))

    def _assign(self, connection: Connection) -> int:
        columns = self.table.c
        without = select(columns.id).where(columns.position.is_(None)).order_by(columns.id)
        ids = list(connection.scalars(without.limit(BATCH)))
        last = connection.scalar(select(func.max(columns.position))) or 0
        if ids:
            statement = (
                update(self.table)
                .where(columns.id == bindparam("its_id"))
                .values(position=bindparam("its_position"))
            )
            numbered = enumerate(ids, last + 1)
            connection.execute(
                statement, [{"its_id": id_, "its_position": position} for position, id_ in numbered]
            )
        return len(ids)

    # ── statements ──────────────────────────────────────────────────────────────────────────

    @cached_property
    def _appending(self) -> Insert:
        return insert(self.table).values(at=self.dialect.now())

    def _of_stream(self, stream: str) -> tuple[ColumnElement[bool], ...]:
        category, key = parts_of(stream)
        return self.table.c.category == category, self.table.c.key == key

    def _conditions(self, wanted: EventFilter) -> Iterator[ColumnElement[bool]]:
        columns = self.table.c
        if wanted.stream is not None:
            yield from self._of_stream(wanted.stream)
        if wanted.category is not None:
            yield columns.category == wanted.category
        if wanted.types:
            yield columns.type.in_(wanted.types)
        if wanted.since is not None:
            yield columns.at >= utc(wanted.since)
        if wanted.until is not None:
            yield columns.at < utc(wanted.until)


def parts_of(stream: str) -> tuple[str, str]:
    """Split the name of a *stream* into category and key.

    Raises:
        InvalidEvent: the name is not ``<category>.<key>``.
    """
    category, dot, key = stream.partition(".")
    if not dot or not category or not key:
        raise InvalidEvent(f"{stream!r} is no stream: use <category>.<key>, as in 'order.7'.")
    return category, key


def _to_row(event: Event) -> dict[str, Any]:
    return {
        "event_id": event.id,
        "type": event.type,
        "category": event.category,
        "key": event.key,
        "version": event.version,
        "source": event.source,
        "data_version": event.data_version,
        "data": json.dumps(event.data),
        "time": utc(event.time),
        "correlation_id": event.correlation_id,
        "causation_id": event.causation_id,
        "ordered_at": None if event.order is None else json.dumps(event.order),
    }


def _from_row(row: Row[Any]) -> Event:
    return Event(
        id=row.event_id,
        type=row.type,
        source=row.source,
        time=utc(row.time),
        data=json.loads(row.data),
        key=row.key,
        data_version=row.data_version,
        correlation_id=row.correlation_id,
        causation_id=row.causation_id,
        version=row.version,
        position=row.position,
        order=None if row.ordered_at is None else tuple(json.loads(row.ordered_at)),
        recorded=utc(row.at),
    )
