"""Projections: tables whose rows are folds of event streams.

The row with a key is the fold of the events with that key, of this service or others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Column, Connection, MetaData, Table, delete, insert, select, update

from celery_eda.core.event import Event
from celery_eda.core.limits import NAME_LENGTH
from celery_eda.databases import LostRace
from celery_eda.errors import ConfigurationError, InvalidEvent

#: A row of the table, by column.
Values = Mapping[str, Any]
#: The user's function: from a row, or None, and an event to the next row, or None for no row.
Apply = Callable[[Values | None, Event], Values | None]
#: The suffix of a shadow's table and of its consumer.
SHADOW = "_shadow"


@dataclass(frozen=True)
class Projection:
    """One table made of events. A call of the projection is a call of its function.

    Attributes:
        name: of the task that handles the events.
        table: its primary key holds the key of the events.
        apply: returns the row after an event, given the row before it; None for no row.
    """

    name: str
    table: Table
    apply: Apply

    def __post_init__(self) -> None:
        if len(self.table.primary_key.columns) != 1:
            raise ConfigurationError(
                f"The table {self.table.name} of the projection {self.name} needs a primary key of "
                "one column, for the key of the events."
            )
        if len(self.follower.encode()) > NAME_LENGTH:
            raise ConfigurationError(
                f"{self.name} is too long for a projection: give it a shorter name, "
                "`@eda.projection(…, name=…)`."
            )

    def __call__(self, row: Values | None, event: Event) -> Values | None:
        """Return the row after *event*."""
        return self.apply(row, event)

    @property
    def follower(self) -> str:
        """The name of the consumer that keeps the order of events for the shadow."""
        return f"{self.name}{SHADOW}"

    @property
    def shadow(self) -> Table:
        """The shadow table, with the columns and the primary key of the live table."""
        columns = [
            # MariaDB would take 0 for the next number of a key that counts by itself.
            Column(each.name, each.type, primary_key=each.primary_key, autoincrement=False)
            for each in self.table.columns
        ]
        name, options = f"{self.table.name}{SHADOW}", dict(self.table.kwargs.items())
        return Table(name, MetaData(), *columns, schema=self.table.schema, **options)

    def row_key(self, event: Event) -> Any:
        """Return the primary key of the row that belongs to *event*.

        Raises:
            InvalidEvent: the event has no key, or one of another type than the table's.
        """
        if event.key is None:
            raise InvalidEvent(
                f"{event.type} {event.id} has no key, so it belongs to no row of {self.name}. "
                "Emit it with a key, or subscribe to patterns that do not match it."
            )
        kind = self._key(self.table).type.python_type
        try:
            return kind(event.key)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InvalidEvent(
                f"The key {event.key!r} of {event.type} {event.id} is not a valid {kind.__name__}, "
                f"the type of the primary key of {self.table.name}."
            ) from error

    def read(self, connection: Connection, table: Table, key: Any) -> Values | None:
        """Return the row with *key*; None if there is none."""
        query = select(table).where(self._key(table) == key)
        row = connection.execute(query).mappings().one_or_none()
        return None if row is None else dict(row)

    def write(
        self, connection: Connection, table: Table, key: Any, before: Values | None, after: Any
    ) -> None:
        """Replace the row *before* by *after*, either of which may be None for no row.

        Raises:
            InvalidEvent: *after* is neither a mapping nor None.
            LostRace: a concurrent transaction has changed the row; roll back and repeat this one.
        """
        here = self._key(table) == key
        if after is not None and not isinstance(after, Mapping):
            raise InvalidEvent(
                f"{self.name} gave a {type(after).__name__}, not a row: return a dictionary of the "
                "columns, or None for no row."
            )
        if after is None:
            changed = before is None or connection.execute(delete(table).where(here)).rowcount
        elif before is None:
            values = {**after, self._key(table).name: key}
            changed = connection.execute(insert(table).values(values)).rowcount
        else:
            changed = (
                after == before
                or connection.execute(
                    update(table).where(here).values({**after, self._key(table).name: key})
                ).rowcount
            )
        if not changed:
            raise LostRace

    def _key(self, table: Table) -> Column[Any]:
        key: Column[Any] = next(iter(table.primary_key.columns))
        return key


@dataclass(frozen=True)
class ProjectionRegistry:
    """The projections of one app.

    Attributes:
        known: by name.
    """

    known: dict[str, Projection] = field(default_factory=dict)

    def add(self, projection: Projection) -> None:
        """Register *projection*.

        Raises:
            ConfigurationError: another projection has the same table.
        """
        for each in self.known.values():
            if each.table.fullname == projection.table.fullname and each.name != projection.name:
                raise ConfigurationError(
                    f"{projection.name} and {each.name} have the same table, "
                    f"{each.table.fullname}. Give each a table of its own."
                )
        self.known[projection.name] = projection
