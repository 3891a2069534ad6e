"""Alembic's environment: it runs our revisions on a given connection, or prints them as SQL."""

from __future__ import annotations

from alembic import context

attributes = context.config.attributes
tables = attributes["tables"]

context.configure(
    connection=attributes.get("connection"),
    url=attributes.get("url"),
    version_table=tables.version.name,
    version_table_schema=tables.schema,
)
with context.begin_transaction():
    context.run_migrations(prefix=tables.prefix, schema=tables.schema)
