"""What is made of events: projections, snapshots, and the queues of subscriptions."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0007"
down_revision = "0006"

MYSQL = ("mysql", "mariadb")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *MYSQL)
LONG_TEXT = sa.Text().with_variant(mysql.LONGTEXT(), *MYSQL)
KEY = sa.String(255).with_variant(mysql.VARBINARY(255), *MYSQL)
NAME = sa.String(255).with_variant(mysql.VARBINARY(1020), *MYSQL)


def upgrade(prefix: str, schema: str | None) -> None:
    """Create what is missing: an upgrade that was killed half-way can be run again."""
    options: dict[str, Any] = {"schema": schema, "if_not_exists": True}
    for vendor in MYSQL:
        options[f"{vendor}_engine"] = "InnoDB"
        options[f"{vendor}_charset"] = "utf8mb4"
        options[f"{vendor}_collate"] = "utf8mb4_bin"
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
        sa.Column("shadow", sa.String(255)),
        sa.PrimaryKeyConstraint("name"),
        **options,
    )
