"""The numbers given to messages that share an ordering key.

A number is taken under its row's lock at the end of the producer's transaction, so the numbers
of a key are in the order of the commits, without a gap: a transaction that rolls back gives its
number back. The version of a stream of events counts along, and no new epoch begins it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Row, Table, select, update

from celery_eda.dialects.base import Dialect
from celery_eda.identity import ORDER_HEADER, Lane, Position
from celery_eda.message import Message


@dataclass(frozen=True)
class Sequences:
    """The sequences of one service."""

    table: Table
    dialect: Dialect

    def number(self, connection: Connection, messages: Sequence[Message]) -> list[Message]:
        """*messages* in the same order; those of a lane have their place in it.

        Until the transaction ends nobody else gets a number of the same keys. All keys are locked
        in one order: taken one by one as they come, two keys crosswise are a deadlock.
        """
        counts = Counter(message.lane for message in messages if message.lane)
        if not counts:
            return list(messages)
        wanted = {(lane.stream, lane.key): count for lane, count in counts.items()}
        places = {
            (row.stream, row.key): _places(row, wanted[row.stream, row.key])
            for row in self.dialect.take_numbers(
                connection, self.table, dict(sorted(wanted.items()))
            )
        }
        return [
            _at(message, lane, *next(places[lane.stream, lane.key]))
            if (lane := message.lane)
            else message
            for message in messages
        ]

    def version(self, connection: Connection, stream: str, key: str) -> int:
        """How many events a stream has had; 0 if none."""
        columns = self.table.c
        query = select(columns.version).where(columns.stream == stream, columns.key == key)
        return connection.scalar(query) or 0

    def begin_epoch(self, connection: Connection, stream: str | None = None) -> int:
        """Let every count begin again; returns how many there are.

        To be done after the database was restored from a backup: numbers given since then are
        given once more, and consumers would take the new messages for old ones.
        """
        columns = self.table.c
        # Those without a message in this epoch keep what came before it.
        statement = update(self.table).where(columns.last > 0)
        if stream is not None:
            statement = statement.where(columns.stream == stream)
        # In this order: MariaDB assigns from left to right.
        statement = statement.ordered_values(
            (columns.previous_epoch, columns.epoch),
            (columns.previous_last, columns.last),
            (columns.epoch, self.dialect.milliseconds()),
            (columns.last, 0),
        )
        return connection.execute(statement).rowcount


#: Epoch, number and what came before the epoch, as in a :class:`Position`; and the version.
_Place = tuple[int, int, tuple[int, int] | None, int]


def _places(row: Row[Any], count: int) -> Iterator[_Place]:
    """The *count* places that end with those in *row*."""
    before = None
    if row.previous_epoch is not None:
        before = (row.previous_epoch, row.previous_last)
    for back in range(count - 1, -1, -1):
        number = row.last - back
        yield row.epoch, number, before if number == 1 else None, row.version - back


def _at(
    message: Message, lane: Lane, epoch: int, number: int, before: Any, version: int
) -> Message:
    """*message* at its place; its event, if it has one, is at *version* of its stream."""
    position = Position(lane, epoch, number, before)
    placed = message.at(position)
    if (draft := message.draft) is None:
        return placed
    order = tuple(position.headers[ORDER_HEADER])
    event = replace(draft.event, version=version, order=order)
    return replace(placed, draft=replace(draft, event=event))
