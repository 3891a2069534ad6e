"""All tables of version 0.1."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import mysql

revision = "0001_initial"
down_revision = None

MYSQL = ("mysql", "mariadb")
IDENTIFIER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *MYSQL)
BYTES = sa.LargeBinary().with_variant(mysql.LONGBLOB(), *MYSQL)
LONG_TEXT = sa.Text().with_variant(mysql.LONGTEXT(), *MYSQL)
MESSAGE_ID: Any = sa.Uuid().with_variant(sa.Uuid(native_uuid=False), *MYSQL, "sqlite")
TEXT = sa.String(255)
NAME = sa.String(255).with_variant(mysql.VARBINARY(1020), *MYSQL)
KEY = sa.String(255).with_variant(mysql.VARBINARY(255), *MYSQL)

MESSAGE_PARTS = ("headers", "properties", "body")
#: Columns that PostgreSQL compresses with LZ4, which is faster than its default method.
LZ4_COLUMNS = {
    "outbox": (*MESSAGE_PARTS, "envelope"),
    "parked": MESSAGE_PARTS,
    "dead_letters": MESSAGE_PARTS,
    "events": ("data",),
    "queue": ("message", "body"),
}
#: The server itself decides, since the DDL may be printed without a connection to one.
LZ4_STATEMENT = (
    "DO $$ BEGIN IF EXISTS (SELECT FROM pg_settings "
    "WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)) "
    "THEN IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('{table}') "
    "AND attname IN ({columns}) AND attcompression <> 'l') "
    "THEN EXECUTE '{alter}'; END IF; END IF; END $$"
)
#: Longest wait for transactions that use a table. Those that come later wait as long.
LOCK_TIMEOUT = "2s"


def upgrade(prefix: str, schema: str | None) -> None:
    """Create the tables and indexes that do not exist yet.

    An upgrade that was killed half-way can therefore be run again.
    """
    _begin_transaction()
    options: dict[str, Any] = {"schema": schema, "if_not_exists": True}
    for vendor in MYSQL:
        options[f"{vendor}_engine"] = "InnoDB"
        options[f"{vendor}_charset"] = "utf8mb4"
        options[f"{vendor}_collate"] = "utf8mb4_bin"

    _create_outbox_tables(prefix, options)
    _create_inbox_tables(prefix, options)
    _create_dead_letter_tables(prefix, options)
    _create_ordering_tables(prefix, options)
    _create_request_tables(prefix, options)
    _create_event_tables(prefix, options)
    _create_saga_tables(prefix, options)
    _create_queue_tables(prefix, options)
    _create_service_table(prefix, options)
    _compress_messages(prefix, schema)


def _create_outbox_tables(prefix: str, options: dict[str, Any]) -> None:
    op.create_table(
        f"{prefix}outbox",
        sa.Column("id", IDENTIFIER, primary_key=True, autoincrement=True),
        *_message_columns(),
        sa.Column("available_at", MOMENT),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("last_error", LONG_TEXT),
        sa.Column("claimed_by", sa.String(32)),
        sa.Column("envelope", BYTES),
        sa.Column("service", NAME),
        sqlite_autoincrement=True,
        **options,
    )
    _create_index(prefix, options, "outbox", "available", ["available_at", "id"])


def _create_inbox_tables(prefix: str, options: dict[str, Any]) -> None:
    op.create_table(
        f"{prefix}inbox",
        *_attempt_columns(),
        sa.Column("outcome", sa.String(8), nullable=False),
        sa.Column("result", BYTES),
        sa.Column("at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("consumer", "message_id", "revision"),
        **options,
    )
    op.create_table(
        f"{prefix}attempts",
        *_attempt_columns(),
        sa.Column("deliveries", sa.Integer(), nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("cause", sa.String(16)),
        sa.PrimaryKeyConstraint("consumer", "message_id", "revision"),
        **options,
    )
    _create_index(prefix, options, "inbox", "at", ["at"])


def _create_dead_letter_tables(prefix: str, options: dict[str, Any]) -> None:
    op.create_table(
        f"{prefix}dead_letters",
        sa.Column("id", IDENTIFIER, primary_key=True, autoincrement=True),
        *_message_columns(),
        sa.Column("consumer", NAME),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("error_type", TEXT),
        sa.Column("error", LONG_TEXT),
        sa.Column("traceback", LONG_TEXT),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("state", sa.String(16), nullable=False, server_default="open"),
        sa.Column("first_at", MOMENT),
        sa.Column("ordering_key", KEY),
        sa.Column("correlation_id", TEXT),
        sa.Column("causation_id", TEXT),
        sqlite_autoincrement=True,
        **options,
    )
    op.create_table(
        f"{prefix}audit",
        sa.Column("id", IDENTIFIER, primary_key=True, autoincrement=True),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("actor", TEXT, nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("why", LONG_TEXT),
        sa.Column("dead_letter", sa.BigInteger()),
        sa.Column("consumer", NAME),
        sa.Column("message_id", MESSAGE_ID),
        sa.Column("revision", sa.Integer()),
        sa.Column("detail", LONG_TEXT),
        sqlite_autoincrement=True,
        **options,
    )
    _create_index(prefix, options, "dead_letters", "state", ["state", "id"])
    _create_index(prefix, options, "dead_letters", "message", ["message_id"])
    _create_index(prefix, options, "dead_letters", "at", ["at"])
    _create_index(prefix, options, "audit", "message", ["message_id", "id"])
    _create_index(prefix, options, "audit", "letter", ["dead_letter", "at"])
    _create_index(prefix, options, "audit", "at", ["at"])


def _create_ordering_tables(prefix: str, options: dict[str, Any]) -> None:
    op.create_table(
        f"{prefix}sequences",
        sa.Column("stream", NAME, nullable=False),
        sa.Column("key", KEY, nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("last", sa.BigInteger(), nullable=False),
        sa.Column("previous_epoch", sa.BigInteger()),
        sa.Column("previous_last", sa.BigInteger()),
        sa.Column("version", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("history", sa.String(80)),
        sa.PrimaryKeyConstraint("stream", "key"),
        **options,
    )
    op.create_table(
        f"{prefix}cursors",
        *_key_columns(),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("last", sa.BigInteger(), nullable=False),
        sa.Column("held", sa.Integer()),
        sa.Column("parked", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("consumer", "source", "stream", "key"),
        **options,
    )
    op.create_table(
        f"{prefix}parked",
        *_key_columns(),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("previous_epoch", sa.BigInteger()),
        sa.Column("previous_last", sa.BigInteger()),
        *_message_columns(),
        sa.Column("released_at", MOMENT),
        sa.PrimaryKeyConstraint("consumer", "source", "stream", "key", "epoch", "number"),
        **options,
    )
    _create_index(prefix, options, "parked", "message", ["message_id"])


def _create_request_tables(prefix: str, options: dict[str, Any]) -> None:
    op.create_table(
        f"{prefix}requests",
        sa.Column("correlation_id", MESSAGE_ID, nullable=False),
        sa.Column("task", TEXT, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("replied_at", MOMENT),
        sa.Column("content_type", TEXT),
        sa.Column("content_encoding", TEXT),
        sa.Column("body", BYTES),
        sa.PrimaryKeyConstraint("correlation_id"),
        **options,
    )
    _create_index(prefix, options, "requests", "at", ["at"])


def _create_event_tables(prefix: str, options: dict[str, Any]) -> None:
    op.create_table(
        f"{prefix}events",
        sa.Column("id", IDENTIFIER, primary_key=True, autoincrement=True),
        sa.Column("position", sa.BigInteger()),
        sa.Column("event_id", MESSAGE_ID, nullable=False),
        sa.Column("type", KEY, nullable=False),
        sa.Column("category", KEY, nullable=False),
        sa.Column("key", KEY),
        sa.Column("version", sa.BigInteger()),
        sa.Column("source", KEY, nullable=False),
        sa.Column("data_version", sa.Integer(), nullable=False),
        sa.Column("data", LONG_TEXT, nullable=False),
        sa.Column("time", MOMENT, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("correlation_id", TEXT),
        sa.Column("causation_id", TEXT),
        sa.Column("ordered_at", LONG_TEXT),
        sqlite_autoincrement=True,
        **options,
    )
    op.create_table(
        f"{prefix}snapshots",
        sa.Column("category", KEY, nullable=False),
        sa.Column("key", KEY, nullable=False),
        sa.Column("name", KEY, nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("state", LONG_TEXT, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("category", "key", "name", "version"),
        **options,
    )
    op.create_table(
        f"{prefix}declarations",
        sa.Column("queue", NAME, nullable=False),
        sa.Column("task", NAME, nullable=False),
        sa.Column("patterns", LONG_TEXT, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("queue"),
        **options,
    )
    op.create_table(
        f"{prefix}projections",
        sa.Column("name", NAME, nullable=False),
        sa.Column("shadow", TEXT),
        sa.PrimaryKeyConstraint("name"),
        **options,
    )
    _create_index(prefix, options, "events", "position", ["position"], unique=True)
    _create_index(prefix, options, "events", "event", ["event_id"], unique=True)
    _create_index(prefix, options, "events", "stream", ["category", "key", "version"], unique=True)
    _create_index(prefix, options, "events", "type", ["type", "position"])
    _create_index(prefix, options, "events", "category", ["category", "position"])


def _create_saga_tables(prefix: str, options: dict[str, Any]) -> None:
    op.create_table(
        f"{prefix}sagas",
        sa.Column("id", KEY, nullable=False),
        sa.Column("name", KEY, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("data", LONG_TEXT, nullable=False),
        sa.Column("back", sa.Boolean(), nullable=False),
        sa.Column("cancelled", sa.Boolean(), nullable=False),
        sa.Column("error", LONG_TEXT),
        sa.Column("root", KEY),
        sa.Column("record", sa.BigInteger()),
        sa.Column("begun_at", MOMENT, nullable=False),
        sa.Column("changed_at", MOMENT),
        sa.PrimaryKeyConstraint("id"),
        **options,
    )
    op.create_table(
        f"{prefix}saga_steps",
        sa.Column("id", IDENTIFIER, primary_key=True, autoincrement=True),
        sa.Column("saga", KEY, nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("place", KEY, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("timed_out", sa.Boolean(), nullable=False),
        sa.Column("ended", sa.Integer()),
        sa.Column("request", MESSAGE_ID),
        sa.Column("value", LONG_TEXT, nullable=False),
        sa.Column("who", TEXT),
        sa.Column("begun_at", MOMENT, nullable=False),
        sa.Column("ended_at", MOMENT),
        sa.Column("due", MOMENT),
        sqlite_autoincrement=True,
        **options,
    )
    op.create_table(
        f"{prefix}saga_locks",
        sa.Column("key", KEY, nullable=False),
        sa.Column("place", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("owner", KEY, nullable=False),
        sa.Column("saga", KEY, nullable=False),
        sa.PrimaryKeyConstraint("key", "place"),
        **options,
    )
    _create_index(prefix, options, "sagas", "state", ["state", "changed_at"])
    _create_index(prefix, options, "sagas", "changed", ["changed_at"])
    _create_index(prefix, options, "sagas", "root", ["root"])
    _create_index(prefix, options, "sagas", "record", ["record"], unique=True)
    _create_index(prefix, options, "saga_steps", "saga", ["saga", "id"])
    _create_index(prefix, options, "saga_steps", "request", ["request"], unique=True)
    _create_index(prefix, options, "saga_locks", "owner", ["owner"])


def _create_queue_tables(prefix: str, options: dict[str, Any]) -> None:
    op.create_table(
        f"{prefix}queue",
        sa.Column("id", IDENTIFIER, primary_key=True, autoincrement=True),
        sa.Column("queue", TEXT, nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("due", MOMENT),
        sa.Column("expires_at", MOMENT),
        sa.Column("owner", sa.BigInteger()),
        sa.Column("fence", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("message", LONG_TEXT, nullable=False),
        sa.Column("body", BYTES, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sqlite_autoincrement=True,
        **options,
    )
    op.create_table(
        f"{prefix}bindings",
        sa.Column("exchange", NAME, nullable=False),
        sa.Column("routing_key", NAME, nullable=False),
        sa.Column("queue", NAME, nullable=False),
        sa.Column("owner", sa.BigInteger()),
        sa.PrimaryKeyConstraint("exchange", "routing_key", "queue"),
        **options,
    )
    op.create_table(
        f"{prefix}takers",
        sa.Column("id", IDENTIFIER, primary_key=True, autoincrement=True),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("lease", sa.Float()),
        sqlite_autoincrement=True,
        **options,
    )
    for name, columns, where in (
        ("ready", ["queue", "rank", "id"], "owner IS NULL"),
        ("owned", ["owner", "due"], "owner IS NOT NULL"),
        ("expires", ["expires_at"], "expires_at IS NOT NULL"),
    ):
        _create_index(
            prefix,
            options,
            "queue",
            name,
            columns,
            postgresql_where=sa.text(where),
            sqlite_where=sa.text(where),
        )


def _create_service_table(prefix: str, options: dict[str, Any]) -> None:
    op.create_table(
        f"{prefix}services",
        sa.Column("name", NAME, nullable=False),
        sa.Column("id", MESSAGE_ID, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("name"),
        **options,
    )


def _create_index(
    prefix: str,
    options: dict[str, Any],
    table: str,
    name: str,
    columns: list[str],
    **index_options: Any,
) -> None:
    index, schema = f"ix_{prefix}{table}_{name}", options["schema"]
    # Even with IF NOT EXISTS the server would lock the table.
    if not context.is_offline_mode() and sa.inspect(op.get_bind()).has_index(
        f"{prefix}{table}", index, schema=schema
    ):
        return
    _begin_transaction()
    # MySQL has no IF NOT EXISTS for an index; MariaDB does.
    dialect = op.get_context().dialect
    op.create_index(
        index,
        f"{prefix}{table}",
        columns,
        schema=schema,
        if_not_exists=dialect.name not in MYSQL or bool(getattr(dialect, "is_mariadb", False)),
        **index_options,
    )


def _compress_messages(prefix: str, schema: str | None) -> None:
    if op.get_context().dialect.name != "postgresql":
        return
    quote = op.get_context().dialect.identifier_preparer.quote
    for table, columns in LZ4_COLUMNS.items():
        name = ".".join(quote(each) for each in (schema, f"{prefix}{table}") if each)
        changes = (f"ALTER COLUMN {column} SET COMPRESSION lz4" for column in columns)
        alter = f"ALTER TABLE {name} {', '.join(changes)}".replace("'", "''")
        names = ", ".join(f"'{column}'" for column in columns)
        _begin_transaction()
        table_name = name.replace("'", "''")
        op.execute(LZ4_STATEMENT.format(alter=alter, table=table_name, columns=names))


def _begin_transaction() -> None:
    """Begin another transaction, so that none locks two tables, or waits for long.

    Otherwise the upgrade and a transaction of the service could wait for each other. On MariaDB
    each statement is a transaction; SQLite has one writer.
    """
    if op.get_context().dialect.name == "postgresql":
        with op.get_context().autocommit_block():
            pass
        op.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")


def _message_columns() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("message_id", MESSAGE_ID, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("task", TEXT, nullable=False),
        sa.Column("queue", TEXT),
        sa.Column("exchange", TEXT, nullable=False),
        sa.Column("routing_key", TEXT, nullable=False),
        sa.Column("content_type", TEXT, nullable=False),
        sa.Column("content_encoding", TEXT, nullable=False),
        sa.Column("headers", LONG_TEXT, nullable=False),
        sa.Column("properties", LONG_TEXT, nullable=False),
        sa.Column("body", BYTES, nullable=False),
        sa.Column("preparation", LONG_TEXT),
        sa.Column("created_at", MOMENT, nullable=False),
    )


def _attempt_columns() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("consumer", NAME, nullable=False),
        sa.Column("message_id", MESSAGE_ID, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
    )


def _key_columns() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("consumer", NAME, nullable=False),
        sa.Column("source", KEY, nullable=False),
        sa.Column("stream", NAME, nullable=False),
        sa.Column("key", KEY, nullable=False),
    )
