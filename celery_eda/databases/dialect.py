"""The statements that celery_eda executes, in the form that PostgreSQL and MariaDB share.

A dialect overrides only what its database does differently. Every method uses the caller's
connection and leaves the commit to the caller, unless its docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    CursorResult,
    Delete,
    Engine,
    ExceptionContext,
    Executable,
    Insert,
    Row,
    Select,
    Table,
    TextClause,
    and_,
    bindparam,
    delete,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError

from celery_eda.databases.error_kinds import ErrorKinds
from celery_eda.databases.ping import ping_idle_connections
from celery_eda.databases.statements import cached_statement, columns_of, is_of_service
from celery_eda.databases.types import Moment

Values = Mapping[str, Any]

#: Sequences that one statement advances: databases limit the number of its parameters.
SEQUENCES_AT_ONCE = 200


class Dialect(ErrorKinds):
    """The statements of one database."""

    #: True if the inbox row is inserted before the handler runs. A concurrent copy then waits for
    #: the first transaction to end, instead of running the handler in vain.
    admits_first = True

    #: Worker pools that do not work with this database, by Celery's module name, and the reason.
    refused_pools: Mapping[str, str] = {}

    def __init__(self, claim_timeout: float = 60.0) -> None:
        self.claim_timeout = claim_timeout
        self.statements: dict[Any, Any] = {}

    # ── the engine ──────────────────────────────────────────────────────────────────────────

    def engine_options(self, timeout: float) -> dict[str, Any]:
        """Arguments for :func:`sqlalchemy.create_engine`, with *timeout* in seconds.

        With them no statement waits forever on a connection that is cut off.
        """
        return {"isolation_level": "READ COMMITTED"}

    def configure_engine(self, engine: Engine, timeout: float) -> None:
        """Install the listeners that configure each new connection of *engine*.

        The server ends a transaction that is idle for *timeout* seconds: otherwise a process that
        is frozen, or whose machine is lost, would hold its row locks forever.
        """
        ping_idle_connections(engine)
        self.watch(engine)

    def watch(self, engine: Engine) -> None:
        """Drop the connections of *engine* to a server without writes, such as a former primary."""

        @event.listens_for(engine, "handle_error")
        def on_error(context: ExceptionContext) -> None:
            error = context.sqlalchemy_exception
            if isinstance(error, DBAPIError) and self.takes_no_writes(error):
                context.is_disconnect = True

    def configure_relay_engine(self, engine: Engine) -> None:
        """Install further listeners on the *engine* of relays.

        A relay's commit need not be on disk when it returns: if a power failure undoes it, its
        messages are sent once more, and consumers recognize the copies.
        """

    def exclusive(self, connection: Connection, name: str) -> AbstractContextManager[None]:
        """A block that only one connection at a time runs under this *name*; others wait.

        A database whose locks belong to the transaction holds the lock until the commit.
        """
        raise NotImplementedError

    @contextmanager
    def migration(self, engine: Engine, name: str) -> Iterator[Connection]:
        """A connection for DDL, which one process at a time uses under this *name*."""
        with engine.connect() as connection, self.exclusive(connection, name):
            yield connection
            connection.commit()

    def stop_writers(self, connection: Connection) -> None:
        """Prevent changes, until the commit, to rows that are read and locked from here on.

        Row locks do so; a database without row locks stops all other writers.
        """

    def changes_before(self, connection: Connection) -> object:
        """A value for :meth:`has_written`, taken when the transaction of *connection* begins."""

    def has_written(self, connection: Connection, before: object) -> bool | None:
        """True if the transaction of *connection* has written; None if the database cannot tell."""
        return None

    # ── the database's clock ────────────────────────────────────────────────────────────────

    def now(self) -> ColumnElement[Any]:
        """The current time by the database's clock, never by the caller's."""
        return func.clock_timestamp(type_=Moment)

    def moment(self) -> ColumnElement[Any]:
        """The current time, evaluated once a statement, so that an index can be searched for it."""
        return self.now()

    def later(self, seconds: float) -> ColumnElement[Any]:
        """The time in *seconds* from now, by the database's clock."""
        raise NotImplementedError

    # ── outbox ──────────────────────────────────────────────────────────────────────────────

    def add(self, connection: Connection, table: Table, rows: Sequence[Values]) -> list[int]:
        """Insert *rows* and return their ids in the same order.

        ``delay`` in a row is the number of seconds until the message is due; None for at once.
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
        """Insert *values* in as few statements as possible; returns their ids in the same order."""
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
        service: str | None = None,
    ) -> Sequence[Row[Any]]:
        """Claim up to *limit* rows of *service* that are due; no other claim gets them.

        The claim lasts until this transaction ends. With *ids*, only those rows are considered.
        Delayed rows that have come due go first, and make up at most half of the limit. Of the
        others, rows up to the id *after* may be left out, claimed or not.

        Returns:
            The rows with these *columns*; with all columns if none is named.
        """
        named, came_due, undelayed = self._claims(table, columns)
        if ids:
            return self._rows(connection, named, limit, ids=self._as_parameter(ids))
        its = {"its_service": service}
        delayed = self._rows(connection, came_due, max(1, limit // 2), **its)
        rest = self._rows(connection, undelayed, limit - len(delayed), after=after, **its)
        return [*delayed, *rest]

    @cached_statement
    def _claims(self, table: Table, columns: tuple[str, ...]) -> tuple[Select[Any], ...]:
        """The queries for named rows, for delayed rows that are due, and for undelayed rows."""
        queries = self._named(table), self._came_due(table), self._undelayed(table)
        return tuple(
            query.with_only_columns(*columns_of(table, columns))
            .limit(bindparam("room"))
            .with_for_update(skip_locked=True)
            for query in queries
        )

    def _named(self, table: Table) -> Select[Any]:
        """Query for the rows of the parameter ``ids`` that are due."""
        return select(table).where(self._is_named(table), self._due(table)).order_by(table.c.id)

    def _came_due(self, table: Table) -> Select[Any]:
        """Query for the delayed rows that are due."""
        # In the order of the index here and below, so that a claim reads only the rows it locks.
        return (
            select(table)
            .where(table.c.available_at <= self.moment(), is_of_service(table))
            .order_by(table.c.available_at, table.c.id)
        )

    def _undelayed(self, table: Table) -> Select[Any]:
        """Query for the undelayed rows with an id above the parameter ``after``."""
        return (
            select(table)
            .where(table.c.available_at.is_(None), table.c.id > bindparam("after"))
            .where(is_of_service(table))
            .order_by(table.c.available_at, table.c.id)
        )

    def _due(self, table: Table) -> ColumnElement[bool]:
        return table.c.available_at.is_(None) | (table.c.available_at <= self.moment())

    def _is_named(self, table: Table) -> ColumnElement[bool]:
        """True for the rows of the parameter ``ids``."""
        return table.c.id.in_(bindparam("ids", expanding=True))

    def _as_parameter(self, ids: Sequence[int]) -> Any:
        """The value of the parameter ``ids``."""
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
        """Execute a cached *statement*."""
        return connection.execute(statement, parameters)

    def clear(self, connection: Connection, table: Table, owner: str, ids: Sequence[int]) -> int:
        """Delete claimed rows; returns the number of rows that the *owner* still had claimed."""
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
        """Delay a claimed row for *delay* seconds; if *charged*, count a failed attempt."""
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
        """Release claimed rows unchanged; here the end of the transaction does so."""

    def _owned(
        self, table: Table, owner: str | BindParameter[str]
    ) -> Sequence[ColumnElement[bool]]:
        """The conditions under which *owner* still holds its claim; here the row locks prove it."""
        return ()

    # ── sequences ───────────────────────────────────────────────────────────────────────────

    def milliseconds(self) -> ColumnElement[int]:
        """Milliseconds since 1970 by the database's clock."""
        raise NotImplementedError

    def advance_sequences(
        self, connection: Connection, table: Table, counts: Mapping[tuple[str, str], int]
    ) -> Sequence[Row[Any]]:
        """Advance each sequence by its count, in the order of *counts*; returns the rows."""
        rows = [
            {"stream": stream, "key": key, "last": count, "version": count}
            for (stream, key), count in counts.items()
        ]
        return [
            row
            for start in range(0, len(rows), SEQUENCES_AT_ONCE)
            for row in self._advance(connection, table, rows[start : start + SEQUENCES_AT_ONCE])
        ]

    def _advance(
        self, connection: Connection, table: Table, rows: Sequence[Values]
    ) -> Sequence[Row[Any]]:
        """Insert *rows* with an epoch that begins now, or add their counts to the existing rows."""
        raise NotImplementedError

    # ── inbox ───────────────────────────────────────────────────────────────────────────────

    def insert_once(
        self, connection: Connection, table: Table, values: Values, now: str | None = None
    ) -> bool:
        """Insert a row unless its key exists; waits for a concurrent insert of the same key.

        The column named *now* gets the current time of the database.

        Returns:
            False if the key exists. The transaction remains usable.
        """
        raise NotImplementedError

    # ── housekeeping ────────────────────────────────────────────────────────────────────────

    def purge(
        self, connection: Connection, table: Table, old: ColumnElement[bool], limit: int
    ) -> int:
        """Delete up to *limit* rows that are *old*, the oldest first.

        Rows locked by another transaction are skipped: it is about to delete them too.

        Returns:
            The number of rows deleted.
        """
        rows = connection.execute(self._oldest(table, old, limit)).all()
        if not rows:
            return 0
        keys = [tuple(row) for row in rows]
        return self._delete(connection, table, keys)

    def _oldest(self, table: Table, old: ColumnElement[bool], limit: int) -> Select[Any]:
        """Query for the keys of the *limit* oldest rows."""
        return (
            select(*table.primary_key)
            .where(old)
            .order_by(table.c.at)
            .limit(limit)
            .with_for_update(skip_locked=True, of=table)
        )

    def _delete(self, connection: Connection, table: Table, keys: Sequence[tuple[Any, ...]]) -> int:
        """Delete the rows with these *keys*; returns their number."""
        # One statement a key, in one batch: given a list of composite keys, servers scan the whole
        # table, and MariaDB waits for rows that other transactions have locked.
        columns = list(table.primary_key)
        named = and_(*(column == bindparam(f"its_{column.name}") for column in columns))
        rows = [
            {f"its_{column.name}": value for column, value in zip(columns, key, strict=True)}
            for key in keys
        ]
        return connection.execute(delete(table).where(named), rows).rowcount

    # ── large rows ──────────────────────────────────────────────────────────────────────────

    def refusal_of(self, connection: Connection, row: Values) -> str | None:
        """The reason why the server would refuse to insert *row*, None if it would not.

        Known before the attempt only where a refusal would break the connection.
        """
        return None

    def check_room(self, connection: Connection, octets: int) -> None:
        """Make sure that rows with *octets* bytes can be written.

        Raises:
            UnsafeSetting: the server is configured to refuse them.
        """
