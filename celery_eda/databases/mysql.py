"""MariaDB 10.6 and later, and MySQL 8 as far as it is compatible, through PyMySQL."""

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

from celery_eda.databases import packets
from celery_eda.databases.dialect import Dialect, Values
from celery_eda.databases.statements import cached_statement, is_of_service
from celery_eda.databases.types import Moment
from celery_eda.errors import SchemaOutdated, UnsafeSetting

#: Seconds to wait for a named lock; below the read time-out.
LOCK_TIMEOUT = 50
#: Seconds that DDL waits for the end of transactions that use the table.
DDL_TIMEOUT = 2
#: The parameter ``ids``, a JSON list, as a table.
GIVEN = "JSON_TABLE(:ids, '$[*]' COLUMNS (id BIGINT PATH '$')) AS given"
_PREPARER = MySQLDialect().identifier_preparer
DUPLICATE_KEY = 1062
#: Error codes after which the server has rolled back the transaction, not only the statement.
ROLLED_BACK = ((1213,), (1020,))
_ABORTED = "celery_eda aborted"
#: Bytes that each byte of a value takes in a statement, at most.
ESCAPES = 2
_ESCAPED = (b"\0", b"\n", b"\r", b"\x1a", b'"', b"'", b"\\")
#: Bytes for all other values of a row, its error text and its traceback among them.
OTHER_VALUES = 2**18
#: A packet of this size is allowed on every server that is not misconfigured.
SMALLEST_PACKET = 2**20
GONE_AWAY = frozenset({1040, 1053, 1077, 1079, 1927, 2002, 2003, 2006, 2013, 2055, 4031})
#: The disk is full or broken, memory, threads or connections are used up.
NO_ROOM = frozenset({1021, 1026, 1037, 1038, 1041, 1114, 1135, 1203, 1226})
READ_ONLY = frozenset({1290, 1792, 1836})
#: The code of several refusals, of which one is that of a read-only server.
FORBIDDEN_BY_OPTION = 1290


class MySQL(Dialect):
    # READ COMMITTED, because at REPEATABLE READ the gap locks of a claim would block producers.
    transient_codes = frozenset({1205, 1213, 1020})
    # An incorrect value, too large a packet, too large a row.
    value_codes = frozenset({1366, 1153, 1118, 139})

    def engine_options(self, timeout: float) -> dict[str, Any]:
        seconds = max(math.ceil(timeout), LOCK_TIMEOUT + 10)
        return {
            **super().engine_options(timeout),
            "connect_args": {
                "connect_timeout": 10,
                "read_timeout": seconds,
                "write_timeout": seconds,
            },
        }

    def configure_engine(self, engine: Engine, timeout: float) -> None:
        super().configure_engine(engine, timeout)
        seconds = math.ceil(timeout)

        @event.listens_for(engine, "connect")
        def end_idle_transactions(dbapi_connection: Any, record: Any) -> None:
            # MySQL has no time-out for idle transactions, only for idle connections.
            with dbapi_connection.cursor() as cursor:
                cursor.execute("SHOW VARIABLES LIKE 'idle_transaction_timeout'")
                name = "idle_transaction_timeout" if cursor.fetchall() else "wait_timeout"
                cursor.execute(f"SET SESSION {name} = {seconds}")

    def watch(self, engine: Engine) -> None:
        super().watch(engine)
        packets.explain_refusals(engine)

    @contextmanager
    def exclusive(self, connection: Connection, name: str) -> Iterator[None]:
        # Lock names are global to the server and have at most 64 characters.
        lock = func.sha1(func.concat_ws(".", func.database(), name))
        if connection.scalar(select(func.get_lock(lock, LOCK_TIMEOUT))) != 1:
            raise SchemaOutdated(
                f"Another process has been changing {name} for {LOCK_TIMEOUT} s. "
                "Wait until it has finished, then try again."
            )
        try:
            yield
            # The next holder of the lock has to see the work, which its owner commits later.
            connection.exec_driver_sql("COMMIT")
        finally:
            connection.execute(select(func.release_lock(lock)))

    @contextmanager
    def migration(self, engine: Engine, name: str) -> Iterator[Connection]:
        with super().migration(engine, name) as connection:
            try:
                yield connection
            finally:  # the migration has set it
                connection.exec_driver_sql("SET SESSION lock_wait_timeout = DEFAULT")

    def now(self) -> ColumnElement[Any]:
        return func.utc_timestamp(text("6"), type_=Moment)

    def later(self, seconds: float) -> ColumnElement[Any]:
        return func.timestampadd(text("MICROSECOND"), int(seconds * 1e6), self.now())

    # InnoDB locks, and waits for, every row that a statement scans. Without hints the server scans
    # the whole table when the table is small or the list of ids is long.

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

    def _undelayed(self, table: Table) -> Select[Any]:
        # Ordered by id alone: the server would sort if the order named the NULL column too.
        columns = table.c
        above = (
            columns.available_at.is_(None),
            columns.id > bindparam("after"),
            is_of_service(table),
        )
        return _by_index(select(table).where(*above).order_by(columns.id), table)

    @cached_statement
    def _clearing(self, table: Table) -> TextClause:
        name = _PREPARER.format_table(table)
        return text(f"DELETE {name} FROM {GIVEN} STRAIGHT_JOIN {name} ON {name}.id = given.id")

    def _as_parameter(self, ids: Sequence[int]) -> str:
        return json.dumps(list(ids))

    def milliseconds(self) -> ColumnElement[int]:
        return func.floor(func.unix_timestamp(func.now(text("6"))) * 1000)

    def _advance(
        self, connection: Connection, table: Table, rows: Sequence[Values]
    ) -> Sequence[Row[Any]]:
        fresh = insert(table).values([{**row, "epoch": self.milliseconds()} for row in rows])
        connection.execute(
            fresh.on_duplicate_key_update(
                last=table.c.last + fresh.inserted.last,
                version=table.c.version + fresh.inserted.version,
            )
        )
        # A locking read: at REPEATABLE READ a plain one would return the old values.
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
            isinstance(error, OperationalError) and self.code_of(error) in GONE_AWAY | NO_ROOM
        )

    def takes_no_writes(self, error: DBAPIError) -> bool:
        code, text = self.code_of(error), str(error.orig).replace("_", "-")
        return code in READ_ONLY and (code != FORBIDDEN_BY_OPTION or "read-only" in text)

    def is_aborted(self, connection: Connection) -> bool:
        return _ABORTED in connection.info

    def refusal_of(self, connection: Connection, row: Values) -> str | None:
        texts = [each.encode() if isinstance(each, str) else each for each in row.values()]
        values = [each for each in texts if isinstance(each, bytes)]
        size = sum(map(_escaped, values)) + OTHER_VALUES
        # The server would close the connection, which looks as if it were away.
        if size <= SMALLEST_PACKET or size <= (room := _packet(connection)):
            return None
        return f"its row takes {size} bytes, and max_allowed_packet is {room}"

    def check_room(self, connection: Connection, octets: int) -> None:
        room = _packet(connection)
        if room < ESCAPES * octets:
            raise UnsafeSetting(
                f"max_allowed_packet of the database is {room} bytes. Messages of the size that "
                "eda_max_message_bytes and eda_max_decompressed_bytes allow take up to "
                f"{ESCAPES * octets}. Set max_allowed_packet to that, or lower the two settings."
            )

    def code_of(self, error: DBAPIError) -> object:
        arguments: tuple[Any, ...] = getattr(error.orig, "args", ())
        return arguments[0] if arguments else None


def _packet(connection: Connection) -> int:
    return int(connection.exec_driver_sql("SELECT @@max_allowed_packet").scalar_one())


def _escaped(value: bytes) -> int:
    """Bytes of *value* in the text of a statement."""
    return len(value) + sum(map(value.count, _ESCAPED))


def _by_index(query: Select[Any], table: Table) -> Select[Any]:
    (index,) = table.indexes
    return query.with_hint(table, f"FORCE INDEX (`{index.name}`)")


# After a deadlock the server has ended the transaction, and the next statement silently begins
# another one.


@event.listens_for(Engine, "handle_error")
def on_error(error: ExceptionContext) -> None:
    code = error.original_exception.args[:1]
    if error.dialect.name in ("mysql", "mariadb") and code in ROLLED_BACK:
        assert error.connection is not None, "a deadlock happens in a transaction"
        error.connection.info[_ABORTED] = True


@event.listens_for(Engine, "begin")
def on_begin(connection: Connection) -> None:
    if connection.dialect.name in ("mysql", "mariadb"):
        connection.info.pop(_ABORTED, None)
