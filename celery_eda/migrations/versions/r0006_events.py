"""Every event that was emitted, and the versions of their streams."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0006"
down_revision = "0005"

MYSQL = ("mysql", "mariadb")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *MYSQL)
LONG_TEXT = sa.Text().with_variant(mysql.LONGTEXT(), *MYSQL)
IDENTIFIER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MESSAGE_ID: Any = sa.Uuid().with_variant(sa.Uuid(native_uuid=False), *MYSQL, "sqlite")
TEXT = sa.String(255)
NAME = sa.String(255).with_variant(mysql.VARBINARY(255), *MYSQL)


def upgrade(prefix: str, schema: str | None) -> None:
    """Create what is missing: an upgrade that was killed half-way can be run again."""
    options: dict[str, Any] = {"schema": schema, "if_not_exists": True}
    for vendor in MYSQL:
        options[f"{vendor}_engine"] = "InnoDB"
        options[f"{vendor}_charset"] = "utf8mb4"
        options[f"{vendor}_collate"] = "utf8mb4_bin"
    op.create_table(
        f"{prefix}events",
        sa.Column("id", IDENTIFIER, primary_key=True, autoincrement=True),
        sa.Column("position", sa.BigInteger()),
        sa.Column("event_id", MESSAGE_ID, nullable=False),
        sa.Column("type", NAME, nullable=False),
        sa.Column("category", NAME, nullable=False),
        sa.Column("key", NAME),
        sa.Column("version", sa.BigInteger()),
        sa.Column("source", NAME, nullable=False),
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
    # MySQL has no IF NOT EXISTS for an index; its sister has.
    dialect = op.get_context().dialect
    if_not_exists = dialect.name not in MYSQL or bool(getattr(dialect, "is_mariadb", False))
    for name, columns, unique in (
        ("position", ["position"], True),
        ("event", ["event_id"], True),
        ("stream", ["category", "key", "version"], True),
        ("type", ["type", "position"], False),
        ("category", ["category", "position"], False),
    ):
        op.create_index(
            f"ix_{prefix}events_{name}",
            f"{prefix}events",
            columns,
            unique=unique,
            schema=schema,
            if_not_exists=if_not_exists,
        )
    if "version" not in _columns(f"{prefix}sequences", schema):
        op.add_column(
            f"{prefix}sequences",
            sa.Column("version", sa.BigInteger(), nullable=False, server_default="0"),
            schema=schema,
        )


def _columns(table: str, schema: str | None) -> set[str]:
    """The columns that are there; where the DDL is only printed, nobody knows of any."""
    if op.get_context().as_sql:
        return set()
    found = sa.inspect(op.get_bind()).get_columns(table, schema=schema)
    return {column["name"] for column in found}
