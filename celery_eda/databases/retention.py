"""Rules of retention: which rows of a table may be deleted, and when.

Each store declares the rule for its own table. Ages are measured by the database's clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from sqlalchemy import ColumnElement, Connection, Table, and_, select, true

from celery_eda.databases.dialect import Dialect

#: Seconds. No row is older, and dates begin with the year 1.
LONGEST_AGE = 36500 * 86400.0


class Chore(Protocol):
    """Something that housekeeping does, in batches of rows.

    Attributes:
        what: the name under which its rows are counted.
        is_due: False if the settings switch the chore off.
    """

    @property
    def what(self) -> str: ...
    @property
    def is_due(self) -> bool: ...

    def step(self, connection: Connection, limit: int) -> int:
        """Treat the oldest rows, up to *limit*, in the caller's transaction.

        Returns:
            The number of rows; fewer than *limit* if there are no more.
        """
        ...


def any_row(before: datetime) -> ColumnElement[bool]:
    """The condition of a rule by which age alone decides."""
    return true()


@dataclass(frozen=True)
class Retention:
    """The rule of one table: rows that are old and *unneeded* may be deleted.

    Attributes:
        what: the name under which deleted rows are counted.
        table: its column ``at`` is the time from which the age of a row counts.
        dialect: deletes the rows.
        seconds: the age from which a row is old; None keeps all rows forever.
        unneeded: gives the condition for rows that nothing needs, from the time before which rows
            are old.
    """

    what: str
    table: Table
    dialect: Dialect
    seconds: float | None
    unneeded: Callable[[datetime], ColumnElement[bool]] = any_row

    @property
    def is_due(self) -> bool:
        return self.seconds is not None

    def step(self, connection: Connection, limit: int) -> int:
        if self.seconds is None:
            return 0
        before = ago(connection, self.dialect, self.seconds)
        old = and_(self.table.c.at < before, self.unneeded(before))
        return self.dialect.purge(connection, self.table, old, limit)


def ago(connection: Connection, dialect: Dialect, seconds: float) -> datetime:
    """The time *seconds* ago, as a value: compared with a function, no index would be used."""
    now: datetime = connection.execute(select(dialect.now())).scalar_one()
    return now - timedelta(seconds=min(seconds, LONGEST_AGE))
