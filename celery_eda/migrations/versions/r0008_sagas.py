"""Sagas: the state of each, what has become of each attempt at a part, and what they lock."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0008"
down_revision = "0007"

MYSQL = ("mysql", "mariadb")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *MYSQL)
LONG_TEXT = sa.Text().with_variant(mysql.LONGTEXT(), *MYSQL)
IDENTIFIER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MESSAGE_ID: Any = sa.Uuid().with_variant(sa.Uuid(native_uuid=False), *MYSQL, "sqlite")
KEY = sa.String(255).with_variant(mysql.VARBINARY(255), *MYSQL)


def upgrade(prefix: str, schema: str | None) -> None:
    """Create what is missing: an upgrade that was killed half-way can be run again."""
    options: dict[str, Any] = {"schema": schema, "if_not_exists": True}
    for vendor in MYSQL:
        options[f"{vendor}_engine"] = "InnoDB"
        options[f"{vendor}_charset"] = "utf8mb4"
        options[f"{vendor}_collate"] = "utf8mb4_bin"
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
        sa.Column("who", sa.String(255)),
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
    # MySQL has no IF NOT EXISTS for an index; its sister has.
    dialect = op.get_context().dialect
    if_not_exists = dialect.name not in MYSQL or bool(getattr(dialect, "is_mariadb", False))
    for table, name, columns, unique in (
        ("sagas", "state", ["state", "changed_at"], False),
        ("sagas", "changed", ["changed_at"], False),
        ("sagas", "root", ["root"], False),
        ("sagas", "record", ["record"], True),
        ("saga_steps", "saga", ["saga", "id"], False),
        ("saga_steps", "request", ["request"], True),
        ("saga_locks", "owner", ["owner"], False),
    ):
        op.create_index(
            f"ix_{prefix}{table}_{name}",
            f"{prefix}{table}",
            columns,
            unique=unique,
            schema=schema,
            if_not_exists=if_not_exists,
        )
