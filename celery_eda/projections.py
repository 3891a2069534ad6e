"""Tables made of events: a service's own copy of what others have, row by row a fold of a stream.

Such a table can be made anew beside the one in use, as its shadow. The records say whose shadow is
under way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    MetaData,
    Table,
    delete,
    insert,
    select,
    update,
)

from celery_eda.dialects.base import Dialect, LostRace
from celery_eda.errors import ConfigurationError, InvalidEvent
from celery_eda.event import Event
from celery_eda.limits import NAME_LENGTH

#: A row of the table as a dictionary; None where there is none.
Values = Mapping[str, Any]
Apply = Callable[[Values | None, Event], Values | None]
#: What the name of a shadow ends with: that of its table, and of what follows the events for it.
SHADOW = "_shadow"


class Shadow(str, Enum):
    """How a shadow is made: it is ``following`` the live table, or ``frozen`` in the past."""

    following = "following"
    frozen = "frozen"


@dataclass(frozen=True)
class Projection:
    """One table made of events. Called, it is the function: the next row from a row and an event.

    Attributes:
        name: that of the task which handles the events.
        table: has the events' key for its primary key.
        apply: gives the row after an event, from the one before it; None for no row.
    """

    name: str
    table: Table
    apply: Apply

    def __post_init__(self) -> None:
        if len(self.table.primary_key.columns) != 1:
            raise ConfigurationError(
                f"The table {self.table.name} of the projection {self.name} needs a primary key of "
                "one column, which holds the key of the events."
            )
        if len(self.follower.encode()) > NAME_LENGTH:
            raise ConfigurationError(
                f"{self.name} is too long for a projection: give it a shorter name, "
                "`@eda.projection(…, name=…)`."
            )

    def __call__(self, row: Values | None, event: Event) -> Values | None:
        """The row after *event*."""
        return self.apply(row, event)

    @property
    def follower(self) -> str:
        """Who follows the events for its shadow, in their order."""
        return f"{self.name}{SHADOW}"

    @property
    def shadow(self) -> Table:
        """The table that is made beside its own: the same columns and primary key."""
        columns = [
            # MariaDB would take 0 for the next number of a key that counts by itself.
            Column(each.name, each.type, primary_key=each.primary_key, autoincrement=False)
            for each in self.table.columns
        ]
        name, options = f"{self.table.name}{SHADOW}", dict(self.table.kwargs.items())
        return Table(name, MetaData(), *columns, schema=self.table.schema, **options)

    def row_key(self, event: Event) -> Any:
        """The primary key of the row that *event* is about.

        Raises:
            InvalidEvent: it has no key, or one that cannot be one of the table.
        """
        if event.key is None:
            raise InvalidEvent(
                f"{event.type} {event.id} has no key, so it belongs to no row of {self.name}. "
                "Emit it with a key, or leave it out by the patterns."
            )
        kind = self._key(self.table).type.python_type
        try:
            return kind(event.key)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InvalidEvent(
                f"The key {event.key!r} of {event.type} {event.id} is no {kind.__name__}, as the "
                f"primary key of {self.table.name} is."
            ) from error

    def read(self, connection: Connection, table: Table, key: Any) -> Values | None:
        """The row with that *key*."""
        query = select(table).where(self._key(table) == key)
        row = connection.execute(query).mappings().one_or_none()
        return None if row is None else dict(row)

    def write(
        self, connection: Connection, table: Table, key: Any, before: Values | None, after: Any
    ) -> None:
        """Make *after* of the row that was *before*.

        Raises:
            InvalidEvent: *after* is no row.
            LostRace: somebody else has changed it meanwhile; the transaction is void.
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
class Projections:
    """The projections of one app, and what its database knows of their shadows.

    Attributes:
        records: asks for the table of the shadows, and for its dialect.
        known: by their names.
    """

    records: Callable[[], tuple[Table, Dialect]]
    known: dict[str, Projection] = field(default_factory=dict)

    def add(self, projection: Projection) -> None:
        """Let there be *projection*.

        Raises:
            ConfigurationError: another one has its table already.
        """
        for each in self.known.values():
            if each.table.fullname == projection.table.fullname and each.name != projection.name:
                raise ConfigurationError(
                    f"{projection.name} and {each.name} have the same table, "
                    f"{each.table.fullname}. Give each a table of its own."
                )
        self.known[projection.name] = projection

    @property
    def table(self) -> Table:
        return self.records()[0]

    @property
    def dialect(self) -> Dialect:
        return self.records()[1]

    def share(self, connection: Connection, name: str) -> Shadow | None:
        """Whether there is a shadow; that does not change before this transaction ends."""
        self.dialect.stop_writers(connection)
        return self._locked(connection, name, read=True)

    def lock(self, connection: Connection, name: str) -> Shadow | None:
        """Whether there is a shadow; until this transaction ends nobody handles an event."""
        self.dialect.stop_writers(connection)
        return self._locked(connection, name, read=False)

    def find(self, connection: Connection, name: str) -> Shadow | None:
        """Whether there is a shadow, without a lock."""
        shadow = connection.scalar(select(self.table.c.shadow).where(self._is(name)))
        return None if shadow is None else Shadow(shadow)

    def note(self, connection: Connection, name: str, shadow: Shadow | None) -> None:
        """Write down how its shadow is made; None if there is none any more."""
        value = None if shadow is None else shadow.value
        connection.execute(update(self.table).where(self._is(name)).values(shadow=value))

    def _locked(self, connection: Connection, name: str, *, read: bool) -> Shadow | None:
        query = select(self.table.c.shadow).where(self._is(name)).with_for_update(read=read)
        row = connection.execute(query).one_or_none()
        if row is None:
            self.dialect.insert_once(connection, self.table, {"name": name})
            row = connection.execute(query).one()
        return None if row.shadow is None else Shadow(row.shadow)

    def _is(self, name: str) -> ColumnElement[bool]:
        return self.table.c.name == name
