"""The numbers given to messages that share an ordering key.

A number is taken under its row's lock at the end of the producer's transaction, so the numbers
of a key are in the order of the commits, without a gap: a transaction that rolls back gives its
number back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Table, update

from celery_eda.dialects.base import Dialect
from celery_eda.message import Message, Position


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
        places: dict[tuple[str, str], Iterator[tuple[int, int, tuple[int, int] | None]]] = {}
        for row in self.dialect.take_numbers(connection, self.table, dict(sorted(wanted.items()))):
            name = (row.stream, row.key)
            numbers = range(row.last - wanted[name] + 1, row.last + 1)
            before = None
            if row.previous_epoch is not None:
                before = (row.previous_epoch, row.previous_last)
            places[name] = iter(
                [(row.epoch, number, before if number == 1 else None) for number in numbers]
            )
        return [
            message.at(Position(lane, *next(places[lane.stream, lane.key])))
            if (lane := message.lane)
            else message
            for message in messages
        ]

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
