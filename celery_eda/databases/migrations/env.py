"""Alembic's environment: it runs our revisions on a given connection, or prints them as SQL."""

from __future__ import annotations

from alembic import context

from celery_eda.databases.mysql import DDL_TIMEOUT

attributes = context.config.attributes
tables = attributes["tables"]

context.configure(
    connection=attributes.get("connection"),
    url=attributes.get("url"),
    version_table=tables.version.name,
    version_table_schema=tables.schema,
)
with context.begin_transaction():
    if context.get_context().dialect.name in ("mysql", "mariadb"):
        # A statement that waits to change a table stops all that come after it.
        context.execute(f"SET SESSION lock_wait_timeout = {DDL_TIMEOUT}")
    context.run_migrations(prefix=tables.prefix, schema=tables.schema)
