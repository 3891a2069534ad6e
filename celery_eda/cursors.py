"""The numbers awaited of each ordering key, and the messages parked until their turn comes.

A consumer takes effect with number *n* only after the commit of number *n − 1*. What comes early
is parked: its predecessor is late, or failed; both look the same.

Parking and advancing both write the one row of the lane's cursor, so one of them sees the other:
either the message is parked before its predecessor commits, which then releases it, or its own
look under the lock finds that its turn has come.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
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
    delete,
    func,
    or_,
    select,
    update,
)

from celery_eda import message_rows
from celery_eda.dialects.base import Dialect, LostRace
from celery_eda.identity import Lane, Position
from celery_eda.message import Message


class Turn(Enum):
    """Whether it is a message's turn: ``now``; ``later``, after another; or ``past``."""

    now = "now"
    later = "later"
    past = "past"


@dataclass(frozen=True)
class Cursor:
    """How far a consumer has come in a lane.

    Attributes:
        epoch: 0 before the first message.
        last: number of the last message that had an end in this epoch.
        base: the number at which the consumer joined; what is before was never for it.
        held: revision of the failed message that holds the lane, None if none does.
        parked: messages that wait.
        written: whether the cursor has a row.
    """

    epoch: int = 0
    last: int = 0
    base: int = 0
    held: int | None = None
    parked: int = 0
    written: bool = False

    def joined_after(self, position: Position) -> bool:
        """Whether the message at *position* was sent before the consumer joined."""
        return position.epoch == self.epoch and position.number <= self.base

    def turn(self, position: Position) -> Turn:
        """Whether it is the turn of the message at *position*."""
        if position.epoch == self.epoch:
            if position.number <= self.last:
                return Turn.past
            return Turn.now if position.number == self.last + 1 else Turn.later
        if position.epoch < self.epoch:
            return Turn.past
        if position.number == 1 and self._has_ended(position.previous):
            return Turn.now
        return Turn.later

    def after(self, position: Position) -> Cursor:
        """The cursor once the message at *position* has had its end."""
        base = self.base if position.epoch == self.epoch else 0
        return Cursor(position.epoch, position.number, base, None, self.parked, written=True)

    def _has_ended(self, previous: tuple[int, int] | None) -> bool:
        """Whether nothing of the cursor's epoch is missing that the next one comes after."""
        if previous is not None:
            return self.held is None and (self.epoch, self.last) >= previous
        return self.epoch == 0 or (self.held is None and self.parked == 0)


@dataclass(frozen=True)
class Cursors:
    """The cursors and the parked messages of one database."""

    table: Table
    parked: Table
    dialect: Dialect

    def find(self, connection: Connection, consumer: str, lane: Lane) -> Cursor:
        """The cursor of *consumer* in *lane*, without a lock."""
        return self._read(connection, consumer, lane)

    def lock(self, connection: Connection, consumer: str, lane: Lane) -> Cursor:
        """The cursor, with its row locked; the row is made if there is none."""
        self.dialect.stop_writers(connection)
        cursor = self._read(connection, consumer, lane, lock=True)
        if not cursor.written:
            self._insert(connection, consumer, lane, Cursor())
            cursor = self._read(connection, consumer, lane, lock=True)
        return cursor

    def advance(
        self, connection: Connection, consumer: str, position: Position, cursor: Cursor
    ) -> Message | None:
        """Note that the message at *position* has had its end; *cursor* said that it could.

        Returns:
            The parked message whose turn it is now, to be sent again in this transaction.

        Raises:
            LostRace: the cursor has moved meanwhile; the transaction is void.
        """
        if not self._move(connection, consumer, position, cursor):
            return None
        # That one alone: what waits in an epoch that was given up has not been read by anybody.
        at = self._is_at(consumer, position.lane, position.epoch, position.number)
        self._unpark(connection, consumer, position.lane, at)
        return self.release(connection, consumer, position.lane)

    def go_to(
        self, connection: Connection, consumer: str, position: Position, cursor: Cursor
    ) -> None:
        """Pass all messages up to *position*, with the *cursor* locked, and release none.

        What waits there is deleted: it is for a consumer that has had it by another way.
        """
        after = cursor.after(position)
        self._set(
            connection,
            consumer,
            position.lane,
            epoch=after.epoch,
            last=after.last,
            base=after.base,
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

    def hold(
        self, connection: Connection, consumer: str, position: Position, revision: int
    ) -> None:
        """Note that *revision* of the message at *position* failed: nothing overtakes it."""
        cursor = self.lock(connection, consumer, position.lane)
        if cursor.turn(position) is Turn.now:
            # If it begins an epoch the cursor goes there, or the message would wait for itself.
            self._set(
                connection,
                consumer,
                position.lane,
                epoch=position.epoch,
                last=position.number - 1,
                base=cursor.base if position.epoch == cursor.epoch else 0,
                held=revision,
            )

    def park(
        self, connection: Connection, consumer: str, position: Position, message: Message
    ) -> bool:
        """Keep *message* until its turn comes.

        Returns:
            False if its turn has come meanwhile, and nothing was written; True also for a copy
            of a message that is parked already.

        Raises:
            PlaceTaken: another message waits at the same place.
        """
        cursor = self.lock(connection, consumer, position.lane)
        if cursor.turn(position) is not Turn.later:
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

    def join(
        self, connection: Connection, consumer: str, lane: Lane, epoch: int, last: int
    ) -> bool:
        """Begin after message *last* of *epoch*: what is before is not for this consumer.

        To be done once its queue is bound and before it consumes; *last* is to be read from the
        producer's sequences after the binding, or messages in between would be missed.

        Returns:
            False if the consumer has a cursor there already, which stays.
        """
        return self._insert(connection, consumer, lane, Cursor(epoch, last, base=last))

    def release(self, connection: Connection, consumer: str, lane: Lane) -> Message | None:
        """The parked message whose turn it is; its row stays until it has had its end."""
        cursor = self._read(connection, consumer, lane)
        parked = self.parked.c
        # A locking read: at REPEATABLE READ another would not see what was parked meanwhile.
        row = connection.execute(
            select(self.parked)
            .where(
                self._is_of(self.parked, consumer, lane),
                or_(
                    and_(parked.epoch == cursor.epoch, parked.number == cursor.last + 1),
                    and_(parked.epoch > cursor.epoch, parked.number == 1),
                ),
            )
            .order_by(parked.epoch, parked.number)
            .limit(1)
            .with_for_update()
        ).one_or_none()
        if row is None:
            return None
        _, position = _place(row)
        if cursor.turn(position) is not Turn.now:
            return None
        self._mark_released(connection, consumer, position)
        return message_rows.from_row(row)

    def waiting(self, connection: Connection, consumer: str) -> int:
        """How many messages are parked for *consumer*."""
        query = select(func.count()).where(self.parked.c.consumer == consumer)
        return connection.scalar(query) or 0

    def apart(self, connection: Connection, one: str, other: str, limit: int) -> tuple[str, ...]:
        """Up to *limit* keys in which two consumers have not come equally far."""
        ends = self.table.alias(), self.table.alias()
        found: dict[str, None] = {}
        for here, there in (ends, ends[::-1]):
            names = {ends[0]: one, ends[1]: other}
            same = and_(
                there.c.consumer == names[there],
                *(here.c[name] == there.c[name] for name in _NAMES[1:]),
            )
            far = [
                func.coalesce(here.c[name], 0) != func.coalesce(there.c[name], 0)
                for name in ("epoch", "last")
            ]
            query = select(here.c.key).outerjoin_from(here, there, same)
            query = query.where(here.c.consumer == names[here], or_(*far)).limit(limit)
            found.update(dict.fromkeys(connection.scalars(query)))
        return tuple(found)[:limit]

    def forget(self, connection: Connection, consumer: str) -> None:
        """Delete all that is known of a *consumer* that is no more."""
        for table in (self.parked, self.table):
            connection.execute(delete(table).where(table.c.consumer == consumer))

    def sweep(self, connection: Connection, seconds: float, limit: int) -> list[Message]:
        """Parked messages whose turn has come *seconds* ago and that have not been seen since.

        Whoever released them may have lost them: they are to be sent again in this transaction.
        A copy does no harm.
        """
        parked, cursor = self.parked.c, self.table.c
        stale = or_(parked.released_at.is_(None), parked.released_at < self.dialect.later(-seconds))
        waiting = (
            select(self.parked)
            .join(self.table, and_(*(parked[name] == cursor[name] for name in _NAMES)))
            .where(
                cursor.held.is_(None),
                stale,
                or_(
                    and_(parked.epoch == cursor.epoch, parked.number == cursor.last + 1),
                    and_(parked.epoch > cursor.epoch, parked.number == 1),
                ),
            )
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        messages = []
        for row in connection.execute(waiting).all():
            lane, position = _place(row)
            if self._read(connection, row.consumer, lane).turn(position) is Turn.now:
                self._mark_released(connection, row.consumer, position)
                messages.append(message_rows.from_row(row))
        return messages

    # ── statements ──────────────────────────────────────────────────────────────────────────

    def _read(
        self, connection: Connection, consumer: str, lane: Lane, *, lock: bool = False
    ) -> Cursor:
        query = self._locking if lock else self._reading
        row = self.dialect.execute(connection, query, _its(consumer, lane)).one_or_none()
        return Cursor() if row is None else Cursor(*row, written=True)

    def _move(
        self, connection: Connection, consumer: str, position: Position, cursor: Cursor
    ) -> int:
        """Compare and set: the cursor goes on only if it is still where it was seen.

        Returns:
            How many messages are parked.
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
            "next_base": cursor.base if position.epoch == cursor.epoch else 0,
        }
        if not self.dialect.execute(connection, self._moving, values).rowcount:
            raise LostRace
        return self._read(connection, consumer, lane).parked

    # Made once: making one takes longer than having it run.

    @cached_property
    def _reading(self) -> Select[Any]:
        columns = self.table.c
        its = (columns[name] == bindparam(f"its_{name}") for name in _NAMES)
        return select(
            columns.epoch, columns.last, columns.base, columns.held, columns.parked
        ).where(*its)

    @cached_property
    def _locking(self) -> Select[Any]:
        return self._reading.with_for_update()

    @cached_property
    def _moving(self) -> Update:
        columns = self.table.c
        its = (columns[name] == bindparam(f"its_{name}") for name in (*_NAMES, "epoch", "last"))
        following: dict[str, Any] = {
            name: bindparam(f"next_{name}") for name in ("epoch", "last", "base")
        }
        return update(self.table).where(*its).values(**following, held=None)

    def _insert(self, connection: Connection, consumer: str, lane: Lane, cursor: Cursor) -> bool:
        values = {
            **_names(consumer, lane),
            "epoch": cursor.epoch,
            "last": cursor.last,
            "base": cursor.base,
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
        """Delete parked messages that have had their end."""
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
            raise PlaceTaken

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


class PlaceTaken(Exception):
    """Two messages claim the same place in a lane."""


_NAMES = ("consumer", "source", "stream", "key")


def _its(consumer: str, lane: Lane) -> dict[str, Any]:
    """The parameters that name a cursor."""
    return {f"its_{name}": value for name, value in _names(consumer, lane).items()}


def _names(consumer: str, lane: Lane) -> dict[str, str]:
    return dict(zip(_NAMES, (consumer, lane.source, lane.stream, lane.key), strict=True))


def _place(row: Row[Any]) -> tuple[Lane, Position]:
    lane = Lane(row.source, row.stream, row.key)
    previous = None
    if row.previous_epoch is not None:
        previous = (row.previous_epoch, row.previous_last)
    return lane, Position(lane, row.epoch, row.number, previous)
