"""What the road needs of a database, as PostgreSQL and MariaDB share it.

A database that differs overrides only what differs. Every method takes the caller's connection
and leaves the commit to the caller, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    CursorResult,
    Delete,
    Engine,
    Executable,
    Insert,
    Row,
    Select,
    Table,
    TextClause,
    and_,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, TimeoutError

from celery_eda.column_types import Moment
from celery_eda.dialects import idle
from celery_eda.dialects.statements import cached_statement, columns_of

Values = Mapping[str, Any]

#: Sequences that one statement moves on: databases bound its parameters.
SEQUENCES_AT_ONCE = 200


class LostRace(Exception):
    """A concurrent transaction has committed first; this one can only be rolled back.

    A copy of the message has been handled, or the row to be written has changed meanwhile.
    """


class Dialect:
    """The statements of the road."""

    #: Whether the inbox row is inserted before the handler runs. A concurrent copy then waits
    #: for the first one's end instead of running the handler in vain.
    admits_first = True

    #: Pools, by the name of Celery's module, that this database cannot live with, and why.
    refused_pools: Mapping[str, str] = {}

    #: SQLSTATEs or error codes after which the same transaction may well succeed.
    transient_codes: frozenset[object] = frozenset()

    def __init__(self, claim_timeout: float = 60.0) -> None:
        self.claim_timeout = claim_timeout
        self.statements: dict[Any, Any] = {}

    # ── the engine ──────────────────────────────────────────────────────────────────────────

    def engine_options(self, patience: float) -> dict[str, Any]:
        """Arguments for :func:`sqlalchemy.create_engine`.

        Nothing hangs on a connection that is cut off; with *patience* in seconds.
        """
        return {"isolation_level": "READ COMMITTED"}

    def prepare(self, engine: Engine, patience: float) -> None:
        """Install what each new connection needs.

        The server ends a transaction in which nothing happens for *patience* seconds: a process
        that is frozen, or whose machine is gone, would keep its row locks for ever.
        """
        idle.ask(engine)

    def prepare_for_relays(self, engine: Engine) -> None:
        """Install what each new connection of a relay needs beside that.

        A relay's commits need not be on disk when they return: were one lost with the power, its
        messages would be sent once more, and their copies are known.
        """

    def exclusive(self, connection: Connection, name: str) -> AbstractContextManager[None]:
        """A block that one connection at a time runs under this *name*; others wait for it.

        Where the lock belongs to the transaction it also outlasts the block until the commit.
        """
        raise NotImplementedError

    def stop_writers(self, connection: Connection) -> None:
        """See to it that nobody changes what is read from here on and locked, until the commit.

        Here the locks of the rows do; a database that has none stops all who write.
        """

    # ── the database's clock ────────────────────────────────────────────────────────────────

    def now(self) -> ColumnElement[Any]:
        """The database's own time; never the caller's clock."""
        return func.clock_timestamp(type_=Moment)

    def moment(self) -> ColumnElement[Any]:
        """The same once for a whole statement, so that an index can be searched for it."""
        return self.now()

    def later(self, seconds: float) -> ColumnElement[Any]:
        """The database's own time in *seconds*."""
        raise NotImplementedError

    # ── outbox ──────────────────────────────────────────────────────────────────────────────

    def add(self, connection: Connection, table: Table, rows: Sequence[Values]) -> list[int]:
        """Insert *rows* and return their ids in the same order.

        ``delay`` in a row is the number of seconds until it is due, None for at once.
        """
        now: Any = self.now()
        if any(row["delay"] is not None for row in rows):
            now = connection.scalar(select(now))
        values = [self._scheduled(row, now) for row in rows]
        statement = insert(table).values(created_at=now)
        if connection.dialect.insert_executemany_returning:
            return self._insert_all(connection, statement, table.c.id, values)
        return [connection.execute(statement, row).lastrowid for row in values]

    def _insert_all(
        self, connection: Connection, statement: Insert, row_id: Any, values: Sequence[Values]
    ) -> list[int]:
        """Insert *values* in as few statements as possible; returns their ids in order."""
        ordered = statement.returning(row_id, sort_by_parameter_order=True)
        return list(connection.scalars(ordered, values))

    def _scheduled(self, row: Values, now: Any) -> dict[str, Any]:
        values = dict(row)
        delay = values.pop("delay")
        values["available_at"] = None if delay is None else now + timedelta(seconds=delay)
        return values

    def claim(
        self,
        connection: Connection,
        table: Table,
        owner: str,
        limit: int,
        ids: Sequence[int] = (),
        after: int = 0,
        columns: tuple[str, ...] = (),
    ) -> Sequence[Row[Any]]:
        """Take up to *limit* rows that are due, so that no other claim gets them.

        The claim lasts until this transaction ends; with *ids*, only those rows are looked at.
        Rows that waited until a due time go first and take at most half of the room. Of the others
        those up to the id *after* may be left out, whoever has them.

        Returns:
            All *columns* of the rows; only those, if some are named.
        """
        named, came_due, ready = self._claims(table, columns)
        if ids:
            return self._rows(connection, named, limit, ids=self._as_parameter(ids))
        waited = self._rows(connection, came_due, max(1, limit // 2))
        return [*waited, *self._rows(connection, ready, limit - len(waited), after=after)]

    @cached_statement
    def _claims(self, table: Table, columns: tuple[str, ...]) -> tuple[Select[Any], ...]:
        """What takes rows that are named, that waited and are due, and that need not wait."""
        queries = self._named(table), self._came_due(table), self._ready(table)
        return tuple(
            query.with_only_columns(*columns_of(table, columns))
            .limit(bindparam("room"))
            .with_for_update(skip_locked=True)
            for query in queries
        )

    def _named(self, table: Table) -> Select[Any]:
        """The rows of the parameter ``ids`` that are due."""
        return select(table).where(self._is_named(table), self._due(table)).order_by(table.c.id)

    def _came_due(self, table: Table) -> Select[Any]:
        """The rows that waited and are due."""
        # In the order of the index here and below, so that a claim reads only what it takes.
        return (
            select(table)
            .where(table.c.available_at <= self.moment())
            .order_by(table.c.available_at, table.c.id)
        )

    def _ready(self, table: Table) -> Select[Any]:
        """The rows that need not wait, behind the id of the parameter ``after``."""
        return (
            select(table)
            .where(table.c.available_at.is_(None), table.c.id > bindparam("after"))
            .order_by(table.c.available_at, table.c.id)
        )

    def _due(self, table: Table) -> ColumnElement[bool]:
        return table.c.available_at.is_(None) | (table.c.available_at <= self.moment())

    def _is_named(self, table: Table) -> ColumnElement[bool]:
        """Whether a row is one of the parameter ``ids``."""
        return table.c.id.in_(bindparam("ids", expanding=True))

    def _as_parameter(self, ids: Sequence[int]) -> Any:
        """What the parameter ``ids`` takes."""
        return list(ids)

    def _rows(
        self, connection: Connection, query: Select[Any], limit: int, **parameters: Any
    ) -> Sequence[Row[Any]]:
        if limit < 1:
            return []
        return self.execute(connection, query, {"room": limit, **parameters}).all()

    def execute(
        self, connection: Connection, statement: Executable, parameters: Values
    ) -> CursorResult[Any]:
        """Execute a *statement* that is made once."""
        return connection.execute(statement, parameters)

    def clear(self, connection: Connection, table: Table, owner: str, ids: Sequence[int]) -> int:
        """Delete claimed rows; returns how many of them were still the owner's."""
        parameters = {"ids": self._as_parameter(ids), "its_owner": owner}
        return self.execute(connection, self._clearing(table), parameters).rowcount

    @cached_statement
    def _clearing(self, table: Table) -> Delete | TextClause:
        owned = self._owned(table, bindparam("its_owner"))
        return delete(table).where(self._is_named(table), *owned)

    def postpone(
        self,
        connection: Connection,
        table: Table,
        owner: str,
        row_id: int,
        delay: float,
        why: str,
        *,
        charged: bool = True,
    ) -> int:
        """Let a claimed row rest for *delay* seconds; *charged* counts as a failed attempt."""
        return connection.execute(
            update(table)
            .where(table.c.id == row_id, *self._owned(table, owner))
            .values(
                attempts=table.c.attempts + int(charged),
                available_at=self.later(delay),
                last_error=why,
                claimed_by=None,
            )
        ).rowcount

    def release(self, connection: Connection, table: Table, owner: str, ids: Sequence[int]) -> None:
        """Give claimed rows back untouched; here the end of the transaction does."""

    def _owned(
        self, table: Table, owner: str | BindParameter[str]
    ) -> Sequence[ColumnElement[bool]]:
        """What says that *owner* still has its claim; here the row locks do."""
        return ()

    # ── sequences ───────────────────────────────────────────────────────────────────────────

    def milliseconds(self) -> ColumnElement[int]:
        """Milliseconds since 1970 by the database's clock."""
        raise NotImplementedError

    def take_numbers(
        self, connection: Connection, table: Table, counts: Mapping[tuple[str, str], int]
    ) -> Sequence[Row[Any]]:
        """Move each sequence on by its count, in the order of *counts*; returns the rows."""
        rows = [
            {"stream": stream, "key": key, "last": count, "version": count}
            for (stream, key), count in counts.items()
        ]
        return [
            row
            for start in range(0, len(rows), SEQUENCES_AT_ONCE)
            for row in self._move_on(connection, table, rows[start : start + SEQUENCES_AT_ONCE])
        ]

    def _move_on(
        self, connection: Connection, table: Table, rows: Sequence[Values]
    ) -> Sequence[Row[Any]]:
        """Insert *rows*, with an epoch that begins now, or add to those that are there."""
        raise NotImplementedError

    # ── inbox ───────────────────────────────────────────────────────────────────────────────

    def insert_once(
        self, connection: Connection, table: Table, values: Values, now: str | None = None
    ) -> bool:
        """Insert a row unless its key is taken; a concurrent insert of the same key is waited for.

        The column *now* gets the database's own time.

        Returns:
            False if the key was taken. The transaction is still usable then.
        """
        raise NotImplementedError

    # ── housekeeping ────────────────────────────────────────────────────────────────────────

    def purge(
        self, connection: Connection, table: Table, old: ColumnElement[bool], limit: int
    ) -> int:
        """Delete up to *limit* rows that are *old*, the oldest first.

        Rows that somebody else has locked, to delete them too, are passed over.

        Returns:
            How many were deleted.
        """
        rows = connection.execute(self._oldest(table, old, limit)).all()
        if not rows:
            return 0
        keys = [tuple(row) for row in rows]
        return self._delete(connection, table, keys)

    def _oldest(self, table: Table, old: ColumnElement[bool], limit: int) -> Select[Any]:
        """The keys of the *limit* oldest rows."""
        return (
            select(*table.primary_key)
            .where(old)
            .order_by(table.c.at)
            .limit(limit)
            .with_for_update(skip_locked=True, of=table)
        )

    def _delete(self, connection: Connection, table: Table, keys: Sequence[tuple[Any, ...]]) -> int:
        """Delete the rows with these *keys*; returns how many there were."""
        # One key after the other, in one go: given a list of keys of several columns, servers
        # pass all rows of the table, and MariaDB waits for those that others have locked.
        columns = list(table.primary_key)
        named = and_(*(column == bindparam(f"its_{column.name}") for column in columns))
        rows = [
            {f"its_{column.name}": value for column, value in zip(columns, key, strict=True)}
            for key in keys
        ]
        return connection.execute(delete(table).where(named), rows).rowcount

    # ── errors ──────────────────────────────────────────────────────────────────────────────

    def is_outage(self, error: BaseException) -> bool:
        """Whether the database is away, so that nothing can be said about the transaction."""
        return isinstance(error, DBAPIError) and error.connection_invalidated

    def is_aborted(self, connection: Connection) -> bool:
        """Whether the transaction is lost although nobody was told: its COMMIT would roll back."""
        return False

    def is_transient(self, error: BaseException) -> bool:
        """Whether the transaction lost against others and may succeed when run again.

        They were quicker to lock a row, or to take the pool's last connection.
        """
        return isinstance(error, TimeoutError) or (
            isinstance(error, DBAPIError) and self.code_of(error) in self.transient_codes
        )

    def code_of(self, error: DBAPIError) -> object:
        """The vendor's code of *error*."""
        raise NotImplementedError
