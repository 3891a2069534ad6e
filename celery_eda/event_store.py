"""Every event that this service has emitted, for ever; today's state is the fold of past events.

An event is appended in the transaction that emits it. Events of one category with the same key are
a stream, whose versions count in the order of the commits. All together have positions, which are
given when somebody reads, to what is committed by then: whoever follows them misses no event whose
transaction took long, and meets none twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, TypeVar
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

from celery_eda.clock import utc
from celery_eda.dialects.base import Dialect
from celery_eda.errors import InvalidEvent, VersionConflict
from celery_eda.event import Draft, Event

S = TypeVar("S")

#: Events that get their positions, or are read, at once.
BATCH = 1000


@dataclass(frozen=True)
class Choice:
    """Which events are read; what is None, or empty, chooses all.

    Attributes:
        category: what is before the first dot of their types.
        stream: ``<category>.<key>``.
        types: their types, word for word.
        since, until: when they were appended, by the database's clock; *until* itself is too late.
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

    def append(self, connection: Connection, drafts: Sequence[Draft]) -> None:
        """Write events, each at the version that its stream's sequence has given it.

        Raises:
            VersionConflict: a stream is not at the version that was expected; nothing of this
                transaction may be committed.
        """
        for draft in drafts:
            event = draft.event
            if draft.expected is not None and event.version != draft.expected + 1:
                assert event.stream is not None, "it has a key"
                assert event.version is not None, "its sequence was moved on"
                raise VersionConflict(event.stream, draft.expected, event.version - 1)
        if drafts:
            connection.execute(self._appending, [_to_row(draft.event) for draft in drafts])

    def find(self, connection: Connection, event_id: UUID) -> Event | None:
        """The event with that id."""
        query = select(self.table).where(self.table.c.event_id == event_id)
        row = connection.execute(query).one_or_none()
        return None if row is None else _from_row(row)

    def version(self, connection: Connection, stream: str) -> int:
        """The version of *stream*; 0 if nothing was ever appended to it."""
        query = select(func.max(self.table.c.version)).where(*self._of_stream(stream))
        return connection.scalar(query) or 0

    def stream(
        self,
        connection: Connection,
        stream: str,
        *,
        after: int = 0,
        at: datetime | None = None,
    ) -> Iterator[Event]:
        """The events of *stream* by their versions, those *after* one, appended until *at*."""
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
        choice: Choice | None = None,
        *,
        after: int = 0,
        limit: int = BATCH,
    ) -> list[Event]:
        """Up to *limit* events by their positions, those *after* one.

        Those that have none yet are not among them: see :meth:`give_positions`.
        """
        position = self.table.c.position
        query: Select[Any] = select(self.table).where(position > after).order_by(position)
        query = query.where(*self._chosen(choice or Choice())).limit(limit)
        return [_from_row(row) for row in connection.execute(query)]

    def follow(
        self, engine: Engine, choice: Choice | None = None, *, after: int = 0
    ) -> Iterator[Event]:
        """All events by their positions, those *after* one, page by page; each page read anew.

        Those that have no position when this begins get one.
        """
        self.give_positions(engine)
        while True:
            with engine.connect() as connection:
                page = self.read(connection, choice, after=after)
            yield from page
            if not page:
                return
            after = page[-1].position or after

    def give_positions(self, engine: Engine) -> int:
        """Give positions to what is committed and has none, in short transactions of their own.

        One after the other: whoever sees a position sees, or has seen, all that are before it.

        Returns:
            How many were given.
        """
        total = 0
        while self._has_some_without(engine):
            with (
                engine.connect() as connection,
                self.dialect.exclusive(connection, f"{self.table.fullname}.position"),
            ):
                given = self._give(connection)
                connection.commit()
            total += given
        return total

    def forget(self, connection: Connection, choice: Choice, up_to: int, limit: int) -> int:
        """Delete up to *limit* events of *choice* whose positions are at most *up_to*.

        The last one of all stays, since positions count on from it.

        Returns:
            How many were deleted.
        """
        position = self.table.c.position
        last = connection.scalar(select(func.max(position))) or 0
        chosen = self._chosen(choice)
        ids = select(self.table.c.id).where(position <= up_to, position < last, *chosen)
        found = list(connection.scalars(ids.order_by(position).limit(limit)))
        if found:
            connection.execute(delete(self.table).where(self.table.c.id.in_(found)))
        return len(found)

    def _has_some_without(self, engine: Engine) -> bool:
        """Looked at without the lock, which on SQLite would stop all writers."""
        with engine.connect() as connection:
            some = exists().where(self.table.c.position.is_(None))
            return bool(connection.scalar(select(some)))

    def _give(self, connection: Connection) -> int:
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
                statement, [{"its_id": id_, "its_position": place} for place, id_ in numbered]
            )
        return len(ids)

    # ── statements ──────────────────────────────────────────────────────────────────────────

    @cached_property
    def _appending(self) -> Insert:
        return insert(self.table).values(at=self.dialect.now())

    def _of_stream(self, stream: str) -> tuple[ColumnElement[bool], ...]:
        category, key = parts_of(stream)
        return self.table.c.category == category, self.table.c.key == key

    def _chosen(self, choice: Choice) -> Iterator[ColumnElement[bool]]:
        columns = self.table.c
        if choice.stream is not None:
            yield from self._of_stream(choice.stream)
        if choice.category is not None:
            yield columns.category == choice.category
        if choice.types:
            yield columns.type.in_(choice.types)
        if choice.since is not None:
            yield columns.at >= utc(choice.since)
        if choice.until is not None:
            yield columns.at < utc(choice.until)


def parts_of(stream: str) -> tuple[str, str]:
    """Category and key of a *stream*.

    Raises:
        InvalidEvent: it is none.
    """
    category, dot, key = stream.partition(".")
    if not dot or not category or not key:
        raise InvalidEvent(f"{stream!r} is no stream: give <category>.<key>, as 'order.7'.")
    return category, key


def fold(events: Iterable[Event], initial: S, apply: Callable[[S, Event], S]) -> S:
    """What comes of *initial* when all *events* are applied to it."""
    state = initial
    for event in events:
        state = apply(state, event)
    return state


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
