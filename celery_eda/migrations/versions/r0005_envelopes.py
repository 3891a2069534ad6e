"""Messages keep their properties as AMQP encodes them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0005"
down_revision = "0004"

BYTES = sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")


def upgrade(prefix: str, schema: str | None) -> None:
    """Add the column; one that is there is left alone, for an upgrade that was killed half-way."""
    if "envelope" not in _columns(f"{prefix}outbox", schema):
        op.add_column(f"{prefix}outbox", sa.Column("envelope", BYTES), schema=schema)


def _columns(table: str, schema: str | None) -> set[str]:
    """The columns that are there; where the DDL is only printed, nobody knows of any."""
    if op.get_context().as_sql:
        return set()
    found = sa.inspect(op.get_bind()).get_columns(table, schema=schema)
    return {column["name"] for column in found}
