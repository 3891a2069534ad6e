"""MariaDB from 10.6 on, and MySQL 8 as far as it shares the dialect, through PyMySQL."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    ExceptionContext,
    Row,
    Select,
    Table,
    TextClause,
    bindparam,
    event,
    func,
    literal_column,
    select,
    text,
    tuple_,
)
from sqlalchemy.dialects.mysql import Insert, insert
from sqlalchemy.dialects.mysql.base import MySQLDialect
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from celery_eda.column_types import Moment
from celery_eda.dialects.base import Dialect, Values
from celery_eda.dialects.statements import cached_statement
from celery_eda.errors import SchemaOutdated

#: Seconds; below the read time-out.
LOCK_TIMEOUT = 50
#: A list of ids as a table.
GIVEN = "JSON_TABLE(:ids, '$[*]' COLUMNS (id BIGINT PATH '$')) AS given"
_PREPARER = MySQLDialect().identifier_preparer
DUPLICATE_KEY = 1062
#: After these the server has rolled back the whole transaction, not only the statement.
GIVES_UP = ((1213,), (1020,))
_GIVEN_UP = "celery_eda given up"
GONE_AWAY = frozenset({1040, 1053, 1077, 1079, 1927, 2002, 2003, 2006, 2013, 2055, 4031})


class MySQL(Dialect):
    # READ COMMITTED also because gap locks of a claim would stop producers at REPEATABLE READ.
    transient_codes = frozenset({1205, 1213, 1020})

    def engine_options(self, patience: float) -> dict[str, Any]:
        seconds = max(math.ceil(patience), LOCK_TIMEOUT + 10)
        return {
            **super().engine_options(patience),
            "connect_args": {
                "connect_timeout": 10,
                "read_timeout": seconds,
                "write_timeout": seconds,
            },
        }

    def prepare(self, engine: Engine, patience: float) -> None:
        super().prepare(engine, patience)
        seconds = math.ceil(patience)

        @event.listens_for(engine, "connect")
        def end_idle_transactions(dbapi_connection: Any, record: Any) -> None:
            # MySQL has no such time-out for transactions, only for whole connections.
            with dbapi_connection.cursor() as cursor:
                cursor.execute("SHOW VARIABLES LIKE 'idle_transaction_timeout'")
                name = "idle_transaction_timeout" if cursor.fetchall() else "wait_timeout"
                cursor.execute(f"SET SESSION {name} = {seconds}")

    @contextmanager
    def exclusive(self, connection: Connection, name: str) -> Iterator[None]:
        # The name is known to the whole server and may have 64 characters.
        lock = func.sha1(func.concat_ws(".", func.database(), name))
        if connection.scalar(select(func.get_lock(lock, LOCK_TIMEOUT))) != 1:
            raise SchemaOutdated(
                f"Somebody else has been changing {name} for {LOCK_TIMEOUT} s. "
                "Wait until that has ended, then try again."
            )
        try:
            yield
        finally:
            connection.execute(select(func.release_lock(lock)))

    def now(self) -> ColumnElement[Any]:
        return func.utc_timestamp(text("6"), type_=Moment)

    def later(self, seconds: float) -> ColumnElement[Any]:
        return func.timestampadd(text("MICROSECOND"), int(seconds * 1e6), self.now())

    # InnoDB locks, and waits for, every row that a statement passes on its way. Left alone, the
    # server passes all of them when the table is small or the list of ids is long.

    def _named(self, table: Table) -> Select[Any]:
        return (
            select(table)
            .prefix_with("STRAIGHT_JOIN")
            .select_from(text(GIVEN), table)
            .where(table.c.id == literal_column("given.id"), self._due(table))
            .order_by(table.c.id)
        )

    def _came_due(self, table: Table) -> Select[Any]:
        return _by_index(super()._came_due(table), table)

    def _ready(self, table: Table) -> Select[Any]:
        # By id alone: the server sorts if the column that is NULL is named too.
        columns = table.c
        behind = columns.available_at.is_(None), columns.id > bindparam("after")
        return _by_index(select(table).where(*behind).order_by(columns.id), table)

    @cached_statement
    def _clearing(self, table: Table) -> TextClause:
        name = _PREPARER.format_table(table)
        return text(f"DELETE {name} FROM {GIVEN} STRAIGHT_JOIN {name} ON {name}.id = given.id")

    def _as_parameter(self, ids: Sequence[int]) -> str:
        return json.dumps(list(ids))

    def milliseconds(self) -> ColumnElement[int]:
        return func.floor(func.unix_timestamp(func.now(text("6"))) * 1000)

    def _move_on(
        self, connection: Connection, table: Table, rows: Sequence[Values]
    ) -> Sequence[Row[Any]]:
        fresh = insert(table).values([{**row, "epoch": self.milliseconds()} for row in rows])
        connection.execute(
            fresh.on_duplicate_key_update(
                last=table.c.last + fresh.inserted.last,
                version=table.c.version + fresh.inserted.version,
            )
        )
        # A locking read: at REPEATABLE READ another would see the rows as they were before.
        names = [(row["stream"], row["key"]) for row in rows]
        wanted = tuple_(table.c.stream, table.c.key).in_(names)
        return connection.execute(select(table).where(wanted).with_for_update()).all()

    def insert_once(
        self, connection: Connection, table: Table, values: Values, now: str | None = None
    ) -> bool:
        try:
            connection.execute(self._inserting(table, now), values)
        except IntegrityError as error:
            if self.code_of(error) != DUPLICATE_KEY:
                raise
            return False
        return True

    @cached_statement
    def _inserting(self, table: Table, now: str | None) -> Insert:
        return insert(table).values({now: self.now()} if now else {})

    def _oldest(self, table: Table, old: ColumnElement[bool], limit: int) -> Select[Any]:
        query = super()._oldest(table, old, limit)
        indexes = [index for index in table.indexes if list(index.columns) == [table.c.at]]
        return query.with_hint(table, f"FORCE INDEX (`{indexes[0].name}`)") if indexes else query

    def is_outage(self, error: BaseException) -> bool:
        return super().is_outage(error) or (
            isinstance(error, OperationalError) and self.code_of(error) in GONE_AWAY
        )

    def is_aborted(self, connection: Connection) -> bool:
        return _GIVEN_UP in connection.info

    def code_of(self, error: DBAPIError) -> object:
        arguments: tuple[Any, ...] = getattr(error.orig, "args", ())
        return arguments[0] if arguments else None


def _by_index(query: Select[Any], table: Table) -> Select[Any]:
    (index,) = table.indexes
    return query.with_hint(table, f"FORCE INDEX (`{index.name}`)")


# A deadlock ends the transaction, and the next statement begins another one, unseen.


@event.listens_for(Engine, "handle_error")
def _fail(error: ExceptionContext) -> None:
    code = error.original_exception.args[:1]
    if error.dialect.name in ("mysql", "mariadb") and code in GIVES_UP:
        assert error.connection is not None, "it was in a transaction"
        error.connection.info[_GIVEN_UP] = True


@event.listens_for(Engine, "begin")
def _begin(connection: Connection) -> None:
    if connection.dialect.name in ("mysql", "mariadb"):
        connection.info.pop(_GIVEN_UP, None)
