"""PostgreSQL, through psycopg 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    CursorResult,
    Engine,
    Executable,
    Table,
    Text,
    bindparam,
    cast,
    event,
    extract,
    func,
    select,
)
from sqlalchemy import Dialect as SQLAlchemyDialect
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError, OperationalError

from celery_eda.dialects.base import Values
from celery_eda.dialects.statements import cached_statement, quoted_name
from celery_eda.dialects.upserting import Upserting

#: Of the columns of the outbox that are no text.
_TYPES = {
    "message_id": "uuid", "revision": "int4", "body": "bytea", "delay": "float8",
    "envelope": "bytea",
}  # fmt: skip


#: What is known of a connection: whether a pooler is between.
_POOLED = "celery_eda_pooled"


class PostgreSQL(Upserting):
    insert = staticmethod(insert)
    transient_codes = frozenset({"40001", "40P01", "55P03"})

    def engine_options(self, patience: float) -> dict[str, Any]:
        return {
            **super().engine_options(patience),
            "connect_args": {
                "connect_timeout": 10,
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 30_000,
            },
        }

    def prepare(self, engine: Engine, patience: float) -> None:
        super().prepare(engine, patience)
        _set(
            engine,
            idle_in_transaction_session_timeout=int(patience * 1000),
            # By default the server notices after two hours that a machine is gone.
            tcp_keepalives_idle=10,
            tcp_keepalives_interval=5,
            tcp_keepalives_count=3,
        )

    def prepare_for_relays(self, engine: Engine) -> None:
        # A table that grows faster than its statistics would be read and sorted whole; a plan for
        # any ids, kept since it was empty, would read a whole index for each batch.
        _set(
            engine,
            synchronous_commit="off",
            enable_bitmapscan="off",
            plan_cache_mode="force_custom_plan",
        )
        if engine.dialect.driver == "psycopg":
            event.listen(engine, "connect", _read_binary)

    @contextmanager
    def exclusive(self, connection: Connection, name: str) -> Iterator[None]:
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))
        yield

    def moment(self) -> ColumnElement[Any]:
        # By itself it would be asked for again at each row.
        return select(self.now()).scalar_subquery()

    def later(self, seconds: float) -> ColumnElement[Any]:
        return func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)

    def _is_named(self, table: Table) -> ColumnElement[bool]:
        # One parameter for any number of ids, so that the statement stays the same to the server;
        # a text, since drivers take their time to make an array of a list.
        ids = cast(bindparam("ids", type_=Text), ARRAY(BigInteger))
        return table.c.id == func.any(ids)

    def _as_parameter(self, ids: Sequence[int]) -> str:
        return f"{{{','.join(map(str, ids))}}}"

    def execute(
        self, connection: Connection, statement: Executable, parameters: Values
    ) -> CursorResult[Any]:
        # SQLAlchemy would look up what it has made of the statement, for longer than that runs.
        if connection.dialect.driver != "psycopg":
            return super().execute(connection, statement, parameters)
        text, values = self._compiled(statement, connection.dialect)
        return connection.exec_driver_sql(text, {**values, **parameters})

    @cached_statement
    def _compiled(self, statement: Any, dialect: SQLAlchemyDialect) -> tuple[str, Values]:
        """The text of a statement, and the values that it has already."""
        compiled = statement.compile(dialect=dialect)
        return str(compiled), compiled.params

    def add(self, connection: Connection, table: Table, rows: Sequence[Values]) -> list[int]:
        if connection.dialect.driver != "psycopg":
            return super().add(connection, table, rows)
        names = tuple(rows[0])
        if len(rows) == 1:
            statement, values = self._adding_one(table, names), tuple(rows[0].values())
        else:
            statement = self._adding(table, names)
            values = tuple([row[name] for row in rows] for name in names)
        return list(connection.exec_driver_sql(statement, values).scalars())

    @cached_statement
    def _adding_one(self, table: Table, names: tuple[str, ...]) -> str:
        values = (_scheduled(name, f"%b::{_TYPES.get(name, 'text')}") for name in names)
        return (
            f"INSERT INTO {self._named_columns(table, names)} "
            f"VALUES ({', '.join(values)}, clock_timestamp()) RETURNING id"
        )

    @cached_statement
    def _adding(self, table: Table, names: tuple[str, ...]) -> str:
        """Binary arrays: one statement for any number of rows, 2 to 4 times as fast as the rest."""
        arrays = ", ".join(f"%b::{_TYPES.get(name, 'text')}[]" for name in names)
        return (
            f"INSERT INTO {self._named_columns(table, names)} "
            f"SELECT {', '.join(_scheduled(name, name) for name in names)}, clock_timestamp() "
            f"FROM unnest({arrays}) WITH ORDINALITY AS row({', '.join(names)}, position) "
            "ORDER BY position RETURNING id"
        )

    def _named_columns(self, table: Table, names: tuple[str, ...]) -> str:
        columns = ("available_at" if name == "delay" else name for name in names)
        return f"{quoted_name(table)} ({', '.join(columns)}, created_at)"

    def insert_once(
        self, connection: Connection, table: Table, values: Values, now: str | None = None
    ) -> bool:
        if connection.dialect.driver != "psycopg":
            return super().insert_once(connection, table, values, now)
        statement = self._inserting_once(table, tuple(values), now)
        return connection.exec_driver_sql(statement, tuple(values.values())).first() is not None

    @cached_statement
    def _inserting_once(self, table: Table, names: tuple[str, ...], now: str | None) -> str:
        columns = ", ".join((*names, now) if now else names)
        values = ", ".join(["%s"] * len(names) + ["clock_timestamp()"] * bool(now))
        return (
            f"INSERT INTO {quoted_name(table)} ({columns}) VALUES ({values}) "
            f"ON CONFLICT DO NOTHING RETURNING {next(iter(table.primary_key)).name}"
        )

    def milliseconds(self) -> ColumnElement[int]:
        return cast(extract("epoch", func.clock_timestamp()) * 1000, BigInteger)

    def is_aborted(self, connection: Connection) -> bool:
        # After a statement failed and the handler went on, COMMIT succeeds as a silent ROLLBACK.
        info = getattr(connection.connection.dbapi_connection, "info", None)
        return info is not None and info.transaction_status.name == "INERROR"

    def is_outage(self, error: BaseException) -> bool:
        # 57P: the server shuts down or was told to drop us; 08: connection; 25P03: idle too long.
        return super().is_outage(error) or (
            isinstance(error, OperationalError)
            and str(self.code_of(error) or "08")[:3].startswith(("08", "57P", "53", "25P"))
        )

    def code_of(self, error: DBAPIError) -> object:
        return getattr(error.orig, "sqlstate", None)


def _read_binary(dbapi_connection: Any, record: Any) -> None:
    """Have rows come as they are: as text, a body is twice as long and read twice as slowly."""
    dbapi_connection.cursor_factory = _binary_cursor()


@cache
def _binary_cursor() -> type:
    import psycopg

    class BinaryCursor(psycopg.Cursor[Any]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.format = psycopg.pq.Format.BINARY

    return BinaryCursor


def _scheduled(name: str, value: str) -> str:
    """The *value* of the column; of a delay, the time when it is over."""
    return f"clock_timestamp() + make_interval(secs => {value})" if name == "delay" else value


def _set(engine: Engine, **settings: int | str) -> None:
    """Have *settings* hold for the connections of *engine*.

    A pooler hands the server's session to somebody else after each transaction: what was set for
    the session would be theirs too. So there it is set for each transaction.
    """

    def statement(for_transaction: str) -> str:
        """One for all of them, which is one round trip."""
        calls = (f"set_config('{k}', '{v}', {for_transaction})" for k, v in settings.items())
        return f"SELECT {', '.join(calls)}"

    @event.listens_for(engine, "connect")
    def set_for_the_session(dbapi_connection: Any, record: Any) -> None:
        cursor = dbapi_connection.cursor()
        if _is_pooled(dbapi_connection, cursor):
            record.info[_POOLED] = True
            if hasattr(dbapi_connection, "prepare_threshold"):
                # What was prepared would not be there the next time.
                dbapi_connection.prepare_threshold = None
        else:
            cursor.execute(statement("false"))
        cursor.close()
        dbapi_connection.commit()

    @event.listens_for(engine, "begin")
    def set_for_the_transaction(connection: Connection) -> None:
        if connection.info.get(_POOLED):
            connection.exec_driver_sql(statement("true"))


def _is_pooled(dbapi_connection: Any, cursor: Any) -> bool:
    """Whether the server's process is another one than was said: poolers make one up.

    A driver that does not tell what was said may have a pooler behind it, for all we know.
    """
    cursor.execute("SELECT pg_backend_pid()")
    return bool(cursor.fetchone()[0] != _said_process(dbapi_connection))


def _said_process(dbapi_connection: Any) -> int | None:
    """The server's process as the driver was told of it; None if it does not tell."""
    if (info := getattr(dbapi_connection, "info", None)) is not None:
        process: int = info.backend_pid
        return process
    asyncpg: Any = getattr(dbapi_connection, "driver_connection", None)
    return asyncpg.get_server_pid() if hasattr(asyncpg, "get_server_pid") else None
