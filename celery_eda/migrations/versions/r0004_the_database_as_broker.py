"""The queues of a database that is itself the broker."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0004"
down_revision = "0003"

MYSQL = ("mysql", "mariadb")
IDENTIFIER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *MYSQL)
BYTES = sa.LargeBinary().with_variant(mysql.LONGBLOB(), *MYSQL)
LONG_TEXT = sa.Text().with_variant(mysql.LONGTEXT(), *MYSQL)
TEXT = sa.String(255)
NAME = sa.String(255).with_variant(mysql.VARBINARY(1020), *MYSQL)


def upgrade(prefix: str, schema: str | None) -> None:
    """Create the tables; what is there is left alone, for an upgrade that was killed half-way."""
    options: dict[str, Any] = {"schema": schema, "if_not_exists": True}
    for vendor in MYSQL:
        options[f"{vendor}_engine"] = "InnoDB"
        options[f"{vendor}_charset"] = "utf8mb4"
        options[f"{vendor}_collate"] = "utf8mb4_bin"
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
        sqlite_autoincrement=True,
        **options,
    )
    # MySQL has no IF NOT EXISTS for an index; its sister has.
    dialect = op.get_context().dialect
    if_not_exists = dialect.name not in MYSQL or bool(getattr(dialect, "is_mariadb", False))
    for name, columns, where in (
        ("ready", ["queue", "rank", "id"], "owner IS NULL"),
        ("owned", ["owner", "due"], "owner IS NOT NULL"),
        ("expires", ["expires_at"], "expires_at IS NOT NULL"),
    ):
        op.create_index(
            f"ix_{prefix}queue_{name}",
            f"{prefix}queue",
            columns,
            schema=schema,
            if_not_exists=if_not_exists,
            postgresql_where=sa.text(where),
            sqlite_where=sa.text(where),
        )
