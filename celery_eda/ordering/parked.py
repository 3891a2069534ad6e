"""The messages parked until their turn, each at its position; found and deleted by it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Delete,
    Row,
    ScalarSelect,
    Select,
    Table,
    Update,
    and_,
    bindparam,
    delete,
    func,
    select,
    update,
)

from celery_eda.core.identity import Lane, Position
from celery_eda.core.message import Message
from celery_eda.databases import Dialect, message_rows
from celery_eda.ordering.cursor import Cursor, Turn
from celery_eda.ordering.progress import NAMES


@dataclass(frozen=True)
class ParkedMessages:
    """The parked messages in one database."""

    table: Table
    dialect: Dialect

    def add(
        self, connection: Connection, consumer: str, position: Position, message: Message
    ) -> bool:
        """Store *message*; False if one is stored at its position already."""
        epoch, last = position.previous or (None, None)
        values = message_rows.to_row(message)
        del values["delay"]
        return self.dialect.insert_once(
            connection,
            self.table,
            {
                **values,
                **lane_values(consumer, position.lane),
                "epoch": position.epoch,
                "number": position.number,
                "previous_epoch": epoch,
                "previous_last": last,
            },
            now="created_at",
        )

    def id_at(self, connection: Connection, consumer: str, position: Position) -> Any:
        """The id of the message at *position*; None if there is none."""
        there = _there(consumer, position)
        return self.dialect.execute(connection, self._identifying, there).scalar_one_or_none()

    def delete(self, connection: Connection, consumer: str, position: Position) -> None:
        """Delete the message at *position*, if it is there."""
        self.dialect.execute(connection, self._deleting, _there(consumer, position))

    def find(self, connection: Connection, consumer: str, position: Position) -> Message | None:
        """The message at *position*, locked; None if it is not there."""
        # A locking read, because a snapshot of REPEATABLE READ would miss recently parked rows.
        there = _there(consumer, position)
        row = self.dialect.execute(connection, self._finding, there).one_or_none()
        return None if row is None else message_rows.from_row(row)

    def release(self, connection: Connection, consumer: str, position: Position) -> Message | None:
        """Find the message as :meth:`find` does, and record that it is under way again."""
        if not connection.dialect.update_returning:
            if message := self.find(connection, consumer, position):
                self.mark_released(connection, consumer, position)
            return message
        there = _there(consumer, position)
        row = self.dialect.execute(connection, self._releasing, there).one_or_none()
        return None if row is None else message_rows.from_row(row)

    def next_epoch(
        self, connection: Connection, consumer: str, lane: Lane, cursor: Cursor
    ) -> Position | None:
        """The position of the first message of a later epoch, if its turn has come by *cursor*."""
        its = _there(consumer, Position(lane, cursor.epoch, 1))
        row = self.dialect.execute(connection, self._beginning, its).one_or_none()
        if row is None or cursor.turn_of(position_of(row)) is not Turn.now:
            return None
        return position_of(row)

    def mark_released(self, connection: Connection, consumer: str, position: Position) -> None:
        """Record that the message at *position* is under way again."""
        self.dialect.execute(connection, self._marking, _there(consumer, position))

    @cached_property
    def count_at(self) -> ScalarSelect[Any]:
        """A subquery: 1 if a message is at the position that the parameters give, else 0."""
        return select(func.count()).select_from(self.table).where(self._is_there).scalar_subquery()

    # Cached: building a statement takes longer than executing it.

    @cached_property
    def _identifying(self) -> Select[Any]:
        return select(self.table.c.message_id).where(self._is_there)

    @cached_property
    def _finding(self) -> Select[Any]:
        return select(self.table).where(self._is_there).with_for_update()

    @cached_property
    def _beginning(self) -> Select[Any]:
        columns = self.table.c
        first = and_(
            _is_of_lane(self.table),
            columns.epoch > bindparam("its_epoch"),
            columns.number == bindparam("its_number"),
        )
        return select(self.table).where(first).order_by(columns.epoch).limit(1).with_for_update()

    @cached_property
    def _marking(self) -> Update:
        return update(self.table).where(self._is_there).values(released_at=self.dialect.now())

    @cached_property
    def _releasing(self) -> Any:
        return self._marking.returning(*self.table.c)

    @cached_property
    def _deleting(self) -> Delete:
        return delete(self.table).where(self._is_there)

    @cached_property
    def _is_there(self) -> ColumnElement[bool]:
        columns = self.table.c
        return and_(
            _is_of_lane(self.table),
            columns.epoch == bindparam("its_epoch"),
            columns.number == bindparam("its_number"),
        )


def lane_values(consumer: str, lane: Lane) -> dict[str, str]:
    """The values of :data:`NAMES`."""
    names = (consumer, lane.source, lane.scope, lane.key)
    return dict(zip(NAMES, names, strict=True))


def lane_parameters(consumer: str, lane: Lane) -> dict[str, Any]:
    """The parameters of statements about one lane."""
    return {f"its_{name}": value for name, value in lane_values(consumer, lane).items()}


def position_of(row: Row[Any]) -> Position:
    """The position of the parked message in *row*."""
    previous = None
    if row.previous_epoch is not None:
        previous = (row.previous_epoch, row.previous_last)
    lane = Lane(row.source, row.stream, row.key)
    return Position(lane, row.epoch, row.number, previous)


def _there(consumer: str, position: Position) -> dict[str, Any]:
    its = lane_parameters(consumer, position.lane)
    return {**its, "its_epoch": position.epoch, "its_number": position.number}


def _is_of_lane(table: Table) -> ColumnElement[bool]:
    return and_(*(table.c[name] == bindparam(f"its_{name}") for name in NAMES))
