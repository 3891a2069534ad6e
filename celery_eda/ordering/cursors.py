"""The next number expected for each ordering key, and the messages parked until their turn.

A consumer handles number *n* only after number *n − 1* has committed. An early message is parked,
whether its predecessor is late or has failed.

Parking and advancing both write the row of the key's cursor, so they cannot miss each other: either
the message is parked before its predecessor commits, which then releases it, or the message reads
under the row's lock that its turn has come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    Table,
    Update,
    and_,
    bindparam,
    case,
    delete,
    func,
    or_,
    select,
    update,
)

from celery_eda.core.identity import Lane, Position
from celery_eda.core.message import Message
from celery_eda.databases import Dialect, LostRace, message_rows
from celery_eda.ordering.cursor import Cursor, Turn
from celery_eda.ordering.progress import NAMES


@dataclass(frozen=True)
class Cursors:
    """The cursors and the parked messages in one database.

    A *consumer* is the name of a task, or of the follower of a projection. A *lane* is one ordering
    key of one publishing service.
    """

    table: Table
    parked: Table
    dialect: Dialect

    def find(self, connection: Connection, consumer: str, lane: Lane) -> Cursor:
        """The cursor of *consumer* in *lane*, read without a lock."""
        return self._read(connection, consumer, lane)

    def lock(self, connection: Connection, consumer: str, lane: Lane) -> Cursor:
        """The cursor, with its row locked; the row is inserted if there is none."""
        self.dialect.stop_writers(connection)
        cursor = self._read(connection, consumer, lane, lock=True)
        if not cursor.written:
            self._insert(connection, consumer, lane, Cursor())
            cursor = self._read(connection, consumer, lane, lock=True)
        return cursor

    def advance(
        self, connection: Connection, consumer: str, position: Position, cursor: Cursor
    ) -> Message | None:
        """Move the cursor to *position*, whose message is done with in this transaction.

        *cursor* is the value that said that it was the message's turn.

        Returns:
            The parked message whose turn is next, which the caller has to send again in this
            transaction; None if none is parked.

        Raises:
            LostRace: the cursor has moved meanwhile; roll the transaction back.
        """
        if not self._move(connection, consumer, position, cursor):
            return None
        # Only this one: messages parked in an abandoned epoch have not been handled.
        at = self._is_at(consumer, position.lane, position.epoch, position.number)
        self._unpark(connection, consumer, position.lane, at)
        return self.release(connection, consumer, position.lane)

    def go_to(
        self, connection: Connection, consumer: str, position: Position, cursor: Cursor
    ) -> None:
        """Move the locked *cursor* to *position*, and release no message.

        Messages parked up to there are deleted: a projection has read them from the event store.
        """
        self._set(
            connection,
            consumer,
            position.lane,
            epoch=position.epoch,
            last=position.number,
            held=None,
        )
        if cursor.parked:
            parked = self.parked.c
            passed = or_(
                parked.epoch < position.epoch,
                and_(parked.epoch == position.epoch, parked.number <= position.number),
            )
            here = self._is_of(self.parked, consumer, position.lane)
            self._unpark(connection, consumer, position.lane, and_(here, passed))

    def block(
        self, connection: Connection, consumer: str, position: Position, revision: int
    ) -> None:
        """Record that *revision* of the message at *position* failed, and blocks its key."""
        cursor = self.lock(connection, consumer, position.lane)
        if cursor.turn_of(position) is Turn.now:
            # The first message of an epoch moves the cursor there, or it would wait for itself.
            self._set(
                connection,
                consumer,
                position.lane,
                epoch=position.epoch,
                last=position.number - 1,
                held=revision,
            )

    def park(
        self, connection: Connection, consumer: str, position: Position, message: Message
    ) -> bool:
        """Store *message* until its turn comes.

        Returns:
            False if its turn has come meanwhile: nothing was written. True also for a copy of a
            message that is parked already.

        Raises:
            PositionTaken: another message is parked at the same position.
        """
        cursor = self.lock(connection, consumer, position.lane)
        if cursor.turn_of(position) is not Turn.later:
            return False
        epoch, last = position.previous or (None, None)
        values = message_rows.to_row(message)
        del values["delay"]
        fresh = self.dialect.insert_once(
            connection,
            self.parked,
            {
                **values,
                **_names(consumer, position.lane),
                "epoch": position.epoch,
                "number": position.number,
                "previous_epoch": epoch,
                "previous_last": last,
            },
            now="created_at",
        )
        if fresh:
            self._count_parked(connection, consumer, position.lane, +1)
        else:
            self._require_copy(connection, consumer, position, message)
        return True

    def release(self, connection: Connection, consumer: str, lane: Lane) -> Message | None:
        """The parked message whose turn it is, None if there is none; its row stays for now.

        :meth:`advance` deletes the row once the message is done with.
        """
        cursor = self._read(connection, consumer, lane)
        parked = self.parked.c
        # A locking read, because a snapshot of REPEATABLE READ would miss recently parked rows.
        row = connection.execute(
            select(self.parked)
            .where(
                self._is_of(self.parked, consumer, lane),
                self._may_be_next(cursor.epoch, cursor.last),
            )
            .order_by(parked.epoch, parked.number)
            .limit(1)
            .with_for_update()
        ).one_or_none()
        if row is None:
            return None
        _, position = _position(row)
        if cursor.turn_of(position) is not Turn.now:
            return None
        self._mark_released(connection, consumer, position)
        return message_rows.from_row(row)

    def skip_to(self, connection: Connection, consumer: str, position: Position) -> Message | None:
        """Move the locked cursor to *position*, and release the parked message that follows it."""
        self._set(connection, consumer, position.lane, epoch=position.epoch, last=position.number)
        return self.release(connection, consumer, position.lane)

    def delete(self, connection: Connection, consumer: str) -> None:
        """Delete the cursors and the parked messages of a *consumer* that no longer exists."""
        for table in (self.parked, self.table):
            connection.execute(delete(table).where(table.c.consumer == consumer))

    def sweep(self, connection: Connection, seconds: float, limit: int) -> list[Message]:
        """Parked messages that were due, or released and not handled, *seconds* ago.

        The caller has to send them again in this transaction: a release may have been lost. A copy
        is harmless. Messages of an epoch that the cursor has left are not parked any more: sent
        again, they become dead letters.
        """
        parked, cursor = self.parked.c, self.table.c
        stale = or_(parked.released_at.is_(None), parked.released_at < self.dialect.later(-seconds))
        is_left = parked.epoch < cursor.epoch
        waiting = (
            select(self.parked)
            .join(self.table, and_(*(parked[name] == cursor[name] for name in NAMES)))
            .where(
                stale,
                or_(
                    and_(cursor.held.is_(None), self._may_be_next(cursor.epoch, cursor.last)),
                    is_left,
                ),
            )
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        messages = []
        for row in connection.execute(waiting).all():
            lane, position = _position(row)
            match self._read(connection, row.consumer, lane).turn_of(position):
                case Turn.now:
                    self._mark_released(connection, row.consumer, position)
                case Turn.past:
                    at = self._is_at(row.consumer, lane, position.epoch, position.number)
                    self._unpark(connection, row.consumer, lane, at)
                case Turn.later:
                    continue
            messages.append(message_rows.from_row(row))
        return messages

    # ── statements ──────────────────────────────────────────────────────────────────────────

    def _read(
        self, connection: Connection, consumer: str, lane: Lane, *, lock: bool = False
    ) -> Cursor:
        query = self._locking if lock else self._reading
        row = self.dialect.execute(connection, query, _its(consumer, lane)).one_or_none()
        if row is None:
            return Cursor()
        return Cursor(
            epoch=row.epoch,
            last=row.last,
            held=row.held,
            parked=row.parked,
            oldest=row.oldest,
            written=True,
        )

    def _move(
        self, connection: Connection, consumer: str, position: Position, cursor: Cursor
    ) -> int:
        """Compare and set: move the cursor only if it is still where *cursor* says.

        Returns:
            Number of parked messages.
        """
        lane = position.lane
        if not cursor.written:
            moved = Cursor(position.epoch, position.number)
            if not self._insert(connection, consumer, lane, moved):
                raise LostRace
            return 0
        values = {
            **_its(consumer, lane),
            "its_epoch": cursor.epoch,
            "its_last": cursor.last,
            "next_epoch": position.epoch,
            "next_last": position.number,
        }
        if not self.dialect.execute(connection, self._moving, values).rowcount:
            raise LostRace
        return self._read(connection, consumer, lane).parked

    # Cached: building a statement takes longer than executing it.

    @cached_property
    def _reading(self) -> Select[Any]:
        columns, parked = self.table.c, self.parked.c
        oldest = select(func.min(parked.epoch)).where(*_are_its(self.parked)).scalar_subquery()
        return select(
            columns.epoch,
            columns.last,
            columns.held,
            columns.parked,
            case((columns.parked > 0, oldest)).label("oldest"),
        ).where(*_are_its(self.table))

    @cached_property
    def _locking(self) -> Select[Any]:
        return self._reading.with_for_update()

    @cached_property
    def _moving(self) -> Update:
        columns = self.table.c
        its = (columns[name] == bindparam(f"its_{name}") for name in (*NAMES, "epoch", "last"))
        following: dict[str, Any] = {name: bindparam(f"next_{name}") for name in ("epoch", "last")}
        return update(self.table).where(*its).values(**following, held=None)

    def _insert(self, connection: Connection, consumer: str, lane: Lane, cursor: Cursor) -> bool:
        values = {
            **_names(consumer, lane),
            "epoch": cursor.epoch,
            "last": cursor.last,
            "parked": cursor.parked,
        }
        return self.dialect.insert_once(connection, self.table, values)

    def _set(self, connection: Connection, consumer: str, lane: Lane, **values: Any) -> None:
        where = self._is_of(self.table, consumer, lane)
        connection.execute(update(self.table).where(where).values(**values))

    def _count_parked(self, connection: Connection, consumer: str, lane: Lane, change: int) -> None:
        self._set(connection, consumer, lane, parked=self.table.c.parked + change)

    def _unpark(
        self, connection: Connection, consumer: str, lane: Lane, which: ColumnElement[bool]
    ) -> None:
        """Delete parked messages that are done with."""
        if gone := connection.execute(delete(self.parked).where(which)).rowcount:
            self._count_parked(connection, consumer, lane, -gone)

    def _mark_released(self, connection: Connection, consumer: str, position: Position) -> None:
        at = self._is_at(consumer, position.lane, position.epoch, position.number)
        connection.execute(update(self.parked).where(at).values(released_at=self.dialect.now()))

    def _require_copy(
        self, connection: Connection, consumer: str, position: Position, message: Message
    ) -> None:
        at = self._is_at(consumer, position.lane, position.epoch, position.number)
        there = connection.scalar(select(self.parked.c.message_id).where(at))
        if there != message.identity.id:
            raise PositionTaken

    def _may_be_next(self, epoch: Any, last: Any) -> ColumnElement[bool]:
        """True for the parked message after *last* of *epoch*, and for the first of a later epoch.

        Both are values or columns of a cursor; its ``turn_of`` decides about a later epoch.
        """
        parked = self.parked.c
        return or_(
            and_(parked.epoch == epoch, parked.number == last + 1),
            and_(parked.epoch > epoch, parked.number == 1),
        )

    def _is_of(self, table: Table, consumer: str, lane: Lane) -> ColumnElement[bool]:
        names = _names(consumer, lane)
        return and_(*(table.c[name] == value for name, value in names.items()))

    def _is_at(self, consumer: str, lane: Lane, epoch: int, number: int) -> ColumnElement[bool]:
        parked = self.parked.c
        return and_(
            self._is_of(self.parked, consumer, lane),
            parked.epoch == epoch,
            parked.number == number,
        )


class PositionTaken(Exception):
    """Two messages have the same position."""


def _are_its(table: Table) -> Iterator[ColumnElement[bool]]:
    """The conditions for the rows that the parameters of :func:`_its` name."""
    return (table.c[name] == bindparam(f"its_{name}") for name in NAMES)


def _its(consumer: str, lane: Lane) -> dict[str, Any]:
    """Parameters of the statements that read or move one cursor."""
    return {f"its_{name}": value for name, value in _names(consumer, lane).items()}


def _names(consumer: str, lane: Lane) -> dict[str, str]:
    return dict(zip(NAMES, (consumer, lane.source, lane.scope, lane.key), strict=True))


def _position(row: Row[Any]) -> tuple[Lane, Position]:
    lane = Lane(row.source, row.stream, row.key)
    previous = None
    if row.previous_epoch is not None:
        previous = (row.previous_epoch, row.previous_last)
    return lane, Position(lane, row.epoch, row.number, previous)
