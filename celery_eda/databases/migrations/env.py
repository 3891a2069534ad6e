"""How Alembic runs our revisions: on the connection it is given, or as text."""

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
