"""SQLite, with a write-ahead log: one writer at a time, so no transaction may hold the lock long.

SQLite differs in three ways. A claim is a lease with an owner, since a transaction that stays open
while messages are sent would stop every producer. The inbox row is inserted last, since an early
insert would hold the only write lock while the handler runs. And a transaction begins with its
first writing statement, as a writer at once, so that a reader never becomes a writer half-way
(which SQLite refuses) and a savepoint never becomes a transaction of its own (which would commit
too early).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Engine,
    Insert,
    Integer,
    Row,
    Table,
    bindparam,
    cast,
    event,
    func,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.sql.dml import ReturningUpdate

from celery_eda.databases.dialect import Values
from celery_eda.databases.statements import cached_statement, columns_of, is_of_service
from celery_eda.databases.types import Moment
from celery_eda.databases.upsert import Upserting

_BEGINS_NOTHING = ("SELECT", "PRAGMA", "EXPLAIN", "VALUES", "BEGIN")
_CODES = {
    "database is locked": "SQLITE_BUSY",
    "database table is locked": "SQLITE_LOCKED",
    "database schema is locked": "SQLITE_LOCKED",
    "disk I/O error": "SQLITE_IOERR",
    "database or disk is full": "SQLITE_FULL",
    "unable to open database file": "SQLITE_CANTOPEN",
    "attempt to write a readonly database": "SQLITE_READONLY",
}
#: The beginning of 1970 as a Julian day.
UNIX_EPOCH = 2440587.5
MILLISECONDS_A_DAY = 86_400_000
_FORMAT = "%Y-%m-%d %H:%M:%f000"


class SQLite(Upserting):
    insert = staticmethod(insert)
    admits_first = False
    refused_pools: Mapping[str, str] = dict.fromkeys(
        ("gevent", "eventlet"),
        "a greenlet that waits for SQLite's write lock stops the one that holds it",
    )
    transient_codes = frozenset({"SQLITE_BUSY", "SQLITE_LOCKED"})

    def engine_options(self, timeout: float) -> dict[str, Any]:
        return {"connect_args": {"timeout": 30}}

    def configure_engine(self, engine: Engine, timeout: float) -> None:
        self.watch(engine)

        @event.listens_for(engine, "connect")
        def use_write_ahead_log(dbapi_connection: Any, record: Any) -> None:
            dbapi_connection.execute("PRAGMA journal_mode=WAL")
            dbapi_connection.execute("PRAGMA synchronous=FULL")

        @event.listens_for(engine, "before_cursor_execute")
        def begin_with_first_write(
            connection: Connection, cursor: Any, statement: str, *_: Any
        ) -> None:
            if not statement.lstrip().upper().startswith(_BEGINS_NOTHING):
                self.stop_writers(connection)

    def watch(self, engine: Engine) -> None:
        super().watch(engine)

        @event.listens_for(engine, "checkin")
        def end_transaction(dbapi_connection: Any, record: Any) -> None:
            # After a COMMIT that failed, SQLAlchemy sends no ROLLBACK, and SQLite waits for one.
            # Handlers use the driver sqlite3; the connections of aiosqlite have no such attribute.
            with suppress(engine.dialect.loaded_dbapi.ProgrammingError):  # closed already
                if getattr(dbapi_connection, "in_transaction", False):
                    dbapi_connection.rollback()

    def configure_relay_engine(self, engine: Engine) -> None:
        @event.listens_for(engine, "connect")
        def relax_durability(dbapi_connection: Any, record: Any) -> None:
            dbapi_connection.execute("PRAGMA synchronous=NORMAL")

    @contextmanager
    def exclusive(self, connection: Connection, name: str) -> Iterator[None]:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield

    def stop_writers(self, connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        if not driver.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    def changes_before(self, connection: Connection) -> object:
        """The number of rows that the connection has ever changed."""
        return getattr(connection.connection.driver_connection, "total_changes", None)

    def has_written(self, connection: Connection, before: object) -> bool:
        return self.changes_before(connection) != before

    def now(self) -> ColumnElement[Any]:
        return func.strftime(_FORMAT, "now", type_=Moment)

    def later(self, seconds: float) -> ColumnElement[Any]:
        return func.strftime(_FORMAT, "now", f"{seconds:+.3f} seconds")

    def _insert_all(
        self, connection: Connection, statement: Insert, row_id: Any, values: Sequence[Values]
    ) -> list[int]:
        # To guarantee the order, SQLAlchemy would insert row by row; here ids ascend with the rows.
        return sorted(connection.scalars(statement.returning(row_id), values))

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
        """Claim rows as the base does, but as a lease: committed here, and ended by the clock."""
        named, due = self._leases(table, columns)
        owned = {"its_owner": owner, "room": limit}
        if ids:
            leased = connection.execute(named, {**owned, "ids": list(ids)}).all()
        else:
            leased = connection.execute(due, {**owned, "its_service": service}).all()
        connection.commit()
        return sorted(leased, key=lambda row: row.id)

    @cached_statement
    def _leases(self, table: Table, columns: tuple[str, ...]) -> tuple[ReturningUpdate[Any], ...]:
        """The statements that lease named rows that are due, and any rows that are due."""
        until = self.later(self.claim_timeout)
        due = self._due(table)
        return tuple(
            update(table)
            .where(
                table.c.id.in_(
                    select(table.c.id).where(which).order_by(table.c.id).limit(bindparam("room"))
                )
            )
            .values(claimed_by=bindparam("its_owner"), available_at=until)
            .returning(*columns_of(table, columns))
            for which in (self._is_named(table) & due, due & is_of_service(table))
        )

    def release(self, connection: Connection, table: Table, owner: str, ids: Sequence[int]) -> None:
        connection.execute(
            update(table)
            .where(table.c.id.in_(ids), *self._owned(table, owner))
            .values(claimed_by=None, available_at=None)
        )

    def _owned(
        self, table: Table, owner: str | BindParameter[str]
    ) -> Sequence[ColumnElement[bool]]:
        return (table.c.claimed_by == owner,)

    def milliseconds(self) -> ColumnElement[int]:
        return cast((func.julianday("now") - UNIX_EPOCH) * MILLISECONDS_A_DAY, Integer)

    def is_outage(self, error: BaseException) -> bool:
        return super().is_outage(error) or (
            isinstance(error, OperationalError)
            and self.code_of(error) in {"SQLITE_IOERR", "SQLITE_FULL", "SQLITE_CANTOPEN"}
        )

    def takes_no_writes(self, error: DBAPIError) -> bool:
        return self.code_of(error) == "SQLITE_READONLY"

    def code_of(self, error: DBAPIError) -> object:
        # By its text: Python 3.10 exposes no code, and later versions expose the extended code.
        text = str(error.orig)
        return next((code for start, code in _CODES.items() if text.startswith(start)), None)
