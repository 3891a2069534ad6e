"""Order per key, and what is done to dead letters: sequences, cursors, parked messages, audit."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0002"
down_revision = "0001"

MYSQL = ("mysql", "mariadb")
IDENTIFIER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *MYSQL)
BYTES = sa.LargeBinary().with_variant(mysql.LONGBLOB(), *MYSQL)
LONG_TEXT = sa.Text().with_variant(mysql.LONGTEXT(), *MYSQL)
MESSAGE_ID: Any = sa.Uuid().with_variant(sa.Uuid(native_uuid=False), *MYSQL, "sqlite")
EXACT_NAME = sa.String(255).with_variant(mysql.VARBINARY(1020), *MYSQL)
KEY = sa.String(255).with_variant(mysql.VARBINARY(255), *MYSQL)
NAME = sa.String(255)


def upgrade(prefix: str, schema: str | None) -> None:
    """Create the tables and add to that of the dead letters.

    What is there is left alone: where DDL commits by itself, an upgrade that was killed half-way
    can so be run again.
    """
    options: dict[str, Any] = {"schema": schema, "if_not_exists": True}
    for vendor in MYSQL:
        options[f"{vendor}_engine"] = "InnoDB"
        options[f"{vendor}_charset"] = "utf8mb4"
        options[f"{vendor}_collate"] = "utf8mb4_bin"

    there = _columns(f"{prefix}dead_letters", schema)
    for column in (
        sa.Column("state", sa.String(16), nullable=False, server_default="open"),
        sa.Column("first_at", MOMENT),
        sa.Column("ordering_key", KEY),
        sa.Column("correlation_id", NAME),
        sa.Column("causation_id", NAME),
    ):
        if column.name not in there:
            op.add_column(f"{prefix}dead_letters", column, schema=schema)
    if "cause" not in _columns(f"{prefix}attempts", schema):
        op.add_column(f"{prefix}attempts", sa.Column("cause", sa.String(16)), schema=schema)
    op.create_table(
        f"{prefix}sequences",
        sa.Column("stream", EXACT_NAME, nullable=False),
        sa.Column("key", KEY, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.Column("previous_epoch", sa.BigInteger),
        sa.Column("previous_last", sa.BigInteger),
        sa.PrimaryKeyConstraint("stream", "key"),
        **options,
    )
    op.create_table(
        f"{prefix}cursors",
        *_key_columns(),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.Column("base", sa.BigInteger, nullable=False),
        sa.Column("held", sa.Integer),
        sa.Column("parked", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("consumer", "source", "stream", "key"),
        **options,
    )
    op.create_table(
        f"{prefix}parked",
        *_key_columns(),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("previous_epoch", sa.BigInteger),
        sa.Column("previous_last", sa.BigInteger),
        *_message_columns(),
        sa.Column("released_at", MOMENT),
        sa.PrimaryKeyConstraint("consumer", "source", "stream", "key", "epoch", "number"),
        **options,
    )
    op.create_table(
        f"{prefix}audit",
        sa.Column("id", IDENTIFIER, primary_key=True, autoincrement=True),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("actor", NAME, nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("why", LONG_TEXT),
        sa.Column("dead_letter", sa.BigInteger),
        sa.Column("consumer", EXACT_NAME),
        sa.Column("message_id", MESSAGE_ID),
        sa.Column("revision", sa.Integer),
        sa.Column("detail", LONG_TEXT),
        sqlite_autoincrement=True,
        **options,
    )
    for table, name, columns in (
        ("inbox", "at", ["at"]),
        ("dead_letters", "state", ["state", "id"]),
        ("dead_letters", "message", ["message_id"]),
        ("dead_letters", "at", ["at"]),
        ("parked", "message", ["message_id"]),
        ("audit", "message", ["message_id", "id"]),
        ("audit", "letter", ["dead_letter", "at"]),
        ("audit", "at", ["at"]),
    ):
        _create_index(prefix, schema, table, name, columns)


def _columns(table: str, schema: str | None) -> set[str]:
    """The columns that *table* has already; none are known where only text is printed."""
    if op.get_context().as_sql:
        return set()
    return {column["name"] for column in sa.inspect(op.get_bind()).get_columns(table, schema)}


def _create_index(
    prefix: str, schema: str | None, table: str, name: str, columns: list[str]
) -> None:
    # MySQL has no IF NOT EXISTS for an index; its sister has.
    dialect = op.get_context().dialect
    knows = dialect.name not in MYSQL or bool(getattr(dialect, "is_mariadb", False))
    op.create_index(
        f"ix_{prefix}{table}_{name}",
        f"{prefix}{table}",
        columns,
        schema=schema,
        if_not_exists=knows,
    )


def _key_columns() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("consumer", EXACT_NAME, nullable=False),
        sa.Column("source", KEY, nullable=False),
        sa.Column("stream", EXACT_NAME, nullable=False),
        sa.Column("key", KEY, nullable=False),
    )


def _message_columns() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("message_id", MESSAGE_ID, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("task", NAME, nullable=False),
        sa.Column("queue", NAME),
        sa.Column("exchange", NAME, nullable=False),
        sa.Column("routing_key", NAME, nullable=False),
        sa.Column("content_type", NAME, nullable=False),
        sa.Column("content_encoding", NAME, nullable=False),
        sa.Column("headers", LONG_TEXT, nullable=False),
        sa.Column("properties", LONG_TEXT, nullable=False),
        sa.Column("body", BYTES, nullable=False),
        sa.Column("preparation", LONG_TEXT),
        sa.Column("created_at", MOMENT, nullable=False),
    )
