"""The road: outbox, inbox, attempts, dead letters."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None

MYSQL = ("mysql", "mariadb")
IDENTIFIER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *MYSQL)
BYTES = sa.LargeBinary().with_variant(mysql.LONGBLOB(), *MYSQL)
LONG_TEXT = sa.Text().with_variant(mysql.LONGTEXT(), *MYSQL)
MESSAGE_ID: Any = sa.Uuid().with_variant(sa.Uuid(native_uuid=False), *MYSQL, "sqlite")
EXACT_NAME = sa.String(255).with_variant(mysql.VARBINARY(1020), *MYSQL)
NAME = sa.String(255)


def upgrade(prefix: str, schema: str | None) -> None:
    """Create the tables.

    Those that are there are left alone: where DDL commits by itself, an upgrade that was killed
    half-way can so be run again.
    """
    options: dict[str, Any] = {"schema": schema, "if_not_exists": True}
    for vendor in MYSQL:
        options[f"{vendor}_engine"] = "InnoDB"
        options[f"{vendor}_charset"] = "utf8mb4"
        options[f"{vendor}_collate"] = "utf8mb4_bin"

    op.create_table(
        f"{prefix}outbox",
        sa.Column("id", IDENTIFIER, primary_key=True, autoincrement=True),
        *_message_columns(),
        sa.Column("available_at", MOMENT),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("last_error", LONG_TEXT),
        sa.Column("claimed_by", sa.String(32)),
        sqlite_autoincrement=True,
        **options,
    )
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
        sa.Column("deliveries", sa.Integer, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("consumer", "message_id", "revision"),
        **options,
    )
    op.create_table(
        f"{prefix}dead_letters",
        sa.Column("id", IDENTIFIER, primary_key=True, autoincrement=True),
        *_message_columns(),
        sa.Column("consumer", EXACT_NAME),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("error_type", NAME),
        sa.Column("error", LONG_TEXT),
        sa.Column("traceback", LONG_TEXT),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sqlite_autoincrement=True,
        **options,
    )
    op.create_index(
        f"ix_{prefix}outbox_available",
        f"{prefix}outbox",
        ["available_at", "id"],
        schema=schema,
        if_not_exists=_knows_index_if_not_exists(),
    )


def _knows_index_if_not_exists() -> bool:
    # MySQL has no such clause; its sister has.
    dialect = op.get_context().dialect
    return dialect.name not in MYSQL or bool(getattr(dialect, "is_mariadb", False))


def _attempt_columns() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("consumer", EXACT_NAME, nullable=False),
        sa.Column("message_id", MESSAGE_ID, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
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
