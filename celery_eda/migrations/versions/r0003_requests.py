"""Durable requests, and what came of them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0003"
down_revision = "0002"

MYSQL = ("mysql", "mariadb")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *MYSQL)
BYTES = sa.LargeBinary().with_variant(mysql.LONGBLOB(), *MYSQL)
MESSAGE_ID: Any = sa.Uuid().with_variant(sa.Uuid(native_uuid=False), *MYSQL, "sqlite")
NAME = sa.String(255)


def upgrade(prefix: str, schema: str | None) -> None:
    """Create the table; what is there is left alone, for an upgrade that was killed half-way."""
    options: dict[str, Any] = {"schema": schema, "if_not_exists": True}
    for vendor in MYSQL:
        options[f"{vendor}_engine"] = "InnoDB"
        options[f"{vendor}_charset"] = "utf8mb4"
        options[f"{vendor}_collate"] = "utf8mb4_bin"
    op.create_table(
        f"{prefix}requests",
        sa.Column("correlation_id", MESSAGE_ID, nullable=False),
        sa.Column("task", NAME, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("replied_at", MOMENT),
        sa.Column("content_type", NAME),
        sa.Column("content_encoding", NAME),
        sa.Column("body", BYTES),
        sa.PrimaryKeyConstraint("correlation_id"),
        **options,
    )
    # MySQL has no IF NOT EXISTS for an index; its sister has.
    dialect = op.get_context().dialect
    op.create_index(
        f"ix_{prefix}requests_at",
        f"{prefix}requests",
        ["at"],
        schema=schema,
        if_not_exists=dialect.name not in MYSQL or bool(getattr(dialect, "is_mariadb", False)),
    )
