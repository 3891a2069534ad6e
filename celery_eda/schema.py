"""The tables in the database: made, checked, and printed for those who make them by hand.

Upgrading twice, or from two machines at once, is harmless. A service may run on tables that a
newer version has upgraded already, since revisions only add.
"""

from __future__ import annotations

import io
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, select
from sqlalchemy.engine.reflection import Inspector

from celery_eda.dialects import dialect_of
from celery_eda.errors import SchemaOutdated
from celery_eda.tables import Tables

REMEDY = "Run `celery -A <app> eda db upgrade`, or have a DBA run what `eda db sql` prints."


def upgrade(engine: Engine, tables: Tables) -> None:
    """Create *tables* or bring them up to date, in a transaction where the database has them.

    Another upgrade of the same tables is waited for.

    Raises:
        SchemaOutdated: the other upgrade did not end in time.
    """
    dialect = dialect_of(engine.url)
    with engine.begin() as connection, dialect.exclusive(connection, str(tables.version)):
        command.upgrade(_config(tables, connection=connection), "head")


def check(engine: Engine, tables: Tables) -> None:
    """Make sure that *tables* are there and are what this version needs.

    Tables that a project's own migrations made carry no version; they are known by their columns.

    Raises:
        SchemaOutdated: they are missing or too old.
    """
    revisions = ScriptDirectory.from_config(_config(tables))
    with engine.connect() as connection:
        inspector = inspect(connection)
        version = _version(connection, inspector, tables)
        if version == revisions.get_current_head():
            return
        if version in {script.revision for script in revisions.walk_revisions()}:
            raise SchemaOutdated(
                f"The tables {tables.prefix}* are of version {version}, and version "
                f"{revisions.get_current_head()} is needed. {REMEDY}"
            )
        if missing := _missing(inspector, tables):
            raise SchemaOutdated(f"{engine.url!r} lacks {', '.join(missing)}. {REMEDY}")


def sql(engine: Engine, tables: Tables) -> str:
    """The DDL that makes *tables*, as text; the database is not asked."""
    output = io.StringIO()
    command.upgrade(_config(tables, url=engine.url, output=output), "head", sql=True)
    return output.getvalue()


def _config(tables: Tables, *, output: io.StringIO | None = None, **attributes: Any) -> Config:
    config = Config(output_buffer=output, attributes={"tables": tables, **attributes})
    config.set_main_option("script_location", "celery_eda:migrations")
    config.set_main_option("path_separator", "os")
    return config


def _version(connection: Connection, inspector: Inspector, tables: Tables) -> str | None:
    if not inspector.has_table(tables.version.name, tables.schema):
        return None
    return connection.scalar(select(tables.version.c.version_num))


def _missing(inspector: Inspector, tables: Tables) -> list[str]:
    """The tables that are not there, and the columns that are not in those that are."""
    missing: list[str] = []
    for table in tables.all:
        if not inspector.has_table(table.name, table.schema):
            missing.append(table.name)
            continue
        found = {column["name"] for column in inspector.get_columns(table.name, table.schema)}
        missing += [
            f"{table.name}.{column.name}" for column in table.columns if column.name not in found
        ]
    return missing
