"""Takers behind a pooler are there for as long as they say so."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade(prefix: str, schema: str | None) -> None:
    """Add the column; one that is there is left alone, for an upgrade that was killed half-way."""
    if "lease" not in _columns(f"{prefix}takers", schema):
        op.add_column(f"{prefix}takers", sa.Column("lease", sa.Float()), schema=schema)


def _columns(table: str, schema: str | None) -> set[str]:
    """The columns that are there; where the DDL is only printed, nobody knows of any."""
    if op.get_context().as_sql:
        return set()
    found = sa.inspect(op.get_bind()).get_columns(table, schema=schema)
    return {column["name"] for column in found}
