"""Numbers of messages that share an ordering key.

A number is assigned at the end of the producer's transaction, under a row lock. So the numbers of a
key follow the order of the commits and have no gaps: a rollback also undoes the assignment. The
version of an event stream is counted in the same row, and a new epoch does not reset it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Row, Table, case, select, update

from celery_eda.core.identity import AHEAD, ANY, ORDER_HEADER, Lane, Position
from celery_eda.core.message import Message
from celery_eda.databases import Dialect


@dataclass(frozen=True)
class Sequences:
    """The sequences of one publishing service."""

    table: Table
    dialect: Dialect

    def number(self, connection: Connection, messages: Sequence[Message]) -> list[Message]:
        """*messages* in the same order; those with an ordering key get their position.

        The rows of the keys stay locked until the transaction ends. They are locked in sorted
        order, so that two transactions with the same keys cannot deadlock.
        """
        counts = Counter(message.lane for message in messages if message.lane)
        if not counts:
            return list(messages)
        wanted = {(lane.scope, lane.key): count for lane, count in counts.items()}
        numbers = {
            (row.stream, row.key): _numbers(row, wanted[row.stream, row.key])
            for row in self.dialect.advance_sequences(
                connection, self.table, dict(sorted(wanted.items()))
            )
        }
        return [
            _numbered(message, lane, *next(numbers[lane.scope, lane.key]))
            if (lane := message.lane)
            else message
            for message in messages
        ]

    def version(self, connection: Connection, stream: str, key: str) -> int:
        """Number of events in a stream; 0 if it has none."""
        columns = self.table.c
        query = select(columns.version).where(columns.stream == stream, columns.key == key)
        return connection.scalar(query) or 0

    def begin_epoch(
        self, connection: Connection, stream: str | None = None, *, awaited: bool = False
    ) -> int:
        """Restart the numbers of all keys, or of those of *stream*, in a new epoch.

        Necessary after the database was restored from a backup: numbers assigned since the backup
        would be assigned again, and consumers would treat the new messages as old ones. PostgreSQL
        tells of most restores, and then each sequence begins an epoch by itself.

        Args:
            connection: of the caller's transaction.
            stream: the sequences of one task, or of one category of events (``<category>.#``).
            awaited: True if consumers handle every message of the earlier epochs first. By default
                they do not wait for messages that have not come.

        Returns:
            The number of sequences that were restarted.
        """
        columns, now = self.table.c, self.dialect.milliseconds()
        # A sequence without a message in this epoch still refers to the epoch before.
        used = columns.last > 0
        before: tuple[Any, Any] = (columns.epoch, columns.last)
        if not awaited:
            used, before = used | (columns.previous_epoch > 0), ANY
        statement = update(self.table).where(used)
        if stream is not None:
            statement = statement.where(columns.stream == stream)
        # In this order: MariaDB assigns from left to right.
        statement = statement.ordered_values(
            (columns.previous_epoch, before[0]),
            (columns.previous_last, before[1]),
            # Never an earlier one, though the clock may have been ahead when the last epoch began;
            # but one that consumers have refused is left.
            (
                columns.epoch,
                case(
                    (now > columns.epoch, now),
                    (columns.epoch > now + AHEAD, now),
                    else_=columns.epoch + 1,
                ),
            ),
            (columns.last, 0),
        )
        return connection.execute(statement).rowcount


#: Epoch, number and previous of a :class:`Position`, and the version of the event stream.
_Numbers = tuple[int, int, tuple[int, int] | None, int]


def _numbers(row: Row[Any], count: int) -> Iterator[_Numbers]:
    """The last *count* numbers that *row* has assigned, in ascending order."""
    before = None
    if row.previous_epoch is not None:
        before = (row.previous_epoch, row.previous_last)
    for back in range(count - 1, -1, -1):
        number = row.last - back
        yield row.epoch, number, before if number == 1 else None, row.version - back


def _numbered(
    message: Message, lane: Lane, epoch: int, number: int, before: Any, version: int
) -> Message:
    """*message* at its position; its event, if any, gets *version* in its stream."""
    position = Position(lane, epoch, number, before)
    numbered = message.at(position)
    if (append := message.event_append) is None:
        return numbered
    order = tuple(position.headers[ORDER_HEADER])
    event = replace(append.event, version=version, order=order)
    return replace(numbered, event_append=replace(append, event=event))
