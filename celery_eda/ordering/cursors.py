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
from celery_eda.ordering.parked import (
    ParkedMessages,
    lane_parameters,
    lane_values,
    position_of,
)
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

    @cached_property
    def waiting(self) -> ParkedMessages:
        """The parked messages."""
        return ParkedMessages(self.parked, self.dialect)

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
            The parked message whose turn is next, which the caller has to handle or to send again;
            None if none is parked.

        Raises:
            LostRace: the cursor has moved meanwhile; roll the transaction back.
        """
        parked = self._move(connection, consumer, position, cursor)
        if cursor.parked:
            # Only this one: messages parked in an abandoned epoch have not been handled.
            self.waiting.delete(connection, consumer, position)
        if not parked:
            return None
        following = Position(position.lane, position.epoch, position.number + 1)
        message = self.waiting.release(connection, consumer, following)
        return message or self.release(connection, consumer, position.lane)

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
        if self.waiting.add(connection, consumer, position, message):
            self._count_parked(connection, consumer, position.lane, +1)
        elif self.waiting.id_at(connection, consumer, position) != message.identity.id:
            raise PositionTaken
        return True

    def release(self, connection: Connection, consumer: str, lane: Lane) -> Message | None:
        """The parked message whose turn it is, None if there is none; its row stays for now.

        :meth:`advance` deletes the row once the message is done with.
        """
        cursor = self._read(connection, consumer, lane)
        following = self._following(connection, consumer, lane, cursor)
        if following is None:
            return None
        return self.waiting.release(connection, consumer, following)

    def next_parked(self, connection: Connection, consumer: str, lane: Lane) -> Message | None:
        """The parked message whose turn it is, unless its key is blocked; nothing is written."""
        cursor = self._read(connection, consumer, lane)
        if cursor.held is not None or not cursor.parked:
            return None
        following = self._following(connection, consumer, lane, cursor)
        if following is None:
            return None
        return self.waiting.find(connection, consumer, following)

    def _following(
        self, connection: Connection, consumer: str, lane: Lane, cursor: Cursor
    ) -> Position | None:
        """The position of the parked message whose turn it is by *cursor*."""
        following = Position(lane, cursor.epoch, cursor.last + 1)
        if self.waiting.id_at(connection, consumer, following) is not None:
            return following
        return self.waiting.next_epoch(connection, consumer, lane, cursor)

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
            position = position_of(row)
            match self._read(connection, row.consumer, position.lane).turn_of(position):
                case Turn.now:
                    self.waiting.mark_released(connection, row.consumer, position)
                case Turn.past:
                    self.waiting.delete(connection, row.consumer, position)
                    self._count_parked(connection, row.consumer, position.lane, -1)
                case Turn.later:
                    continue
            messages.append(message_rows.from_row(row))
        return messages

    # ── statements ──────────────────────────────────────────────────────────────────────────

    def _read(
        self, connection: Connection, consumer: str, lane: Lane, *, lock: bool = False
    ) -> Cursor:
        query = self._locking if lock else self._reading
        row = self.dialect.execute(connection, query, lane_parameters(consumer, lane)).one_or_none()
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
            **lane_parameters(consumer, lane),
            "from_epoch": cursor.epoch,
            "from_last": cursor.last,
            "its_epoch": position.epoch,
            "its_number": position.number,
        }
        # A message that is parked itself was so before its cursor was read.
        is_counted = cursor.parked > 0
        if connection.dialect.update_returning:
            moving = self._moving_returning_counted if is_counted else self._moving_returning
            parked = self.dialect.execute(connection, moving, values).scalar_one_or_none()
        else:
            moving = self._moving_counted if is_counted else self._moving
            rows = self.dialect.execute(connection, moving, values).rowcount
            parked = self._read(connection, consumer, lane).parked if rows else None
        if parked is None:
            raise LostRace
        return int(parked)

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
        here = (columns[name] == bindparam(f"from_{name}") for name in ("epoch", "last"))
        moved: dict[str, Any] = {"epoch": bindparam("its_epoch"), "last": bindparam("its_number")}
        where = (*_are_its(self.table), *here)
        return update(self.table).where(*where).values(**moved, held=None)

    @cached_property
    def _moving_counted(self) -> Update:
        """The statement ``_moving``, for a message that may be parked, and is not from now on."""
        return self._moving.values(parked=self.table.c.parked - self.waiting.count_at)

    @cached_property
    def _moving_returning(self) -> Any:
        return self._moving.returning(self.table.c.parked)

    @cached_property
    def _moving_returning_counted(self) -> Any:
        return self._moving_counted.returning(self.table.c.parked)

    def _insert(self, connection: Connection, consumer: str, lane: Lane, cursor: Cursor) -> bool:
        values = {
            **lane_values(consumer, lane),
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
        names = lane_values(consumer, lane)
        return and_(*(table.c[name] == value for name, value in names.items()))


class PositionTaken(Exception):
    """Two messages have the same position."""


def _are_its(table: Table) -> Iterator[ColumnElement[bool]]:
    """The conditions for the rows that the parameters of one lane name."""
    return (table.c[name] == bindparam(f"its_{name}") for name in NAMES)
