"""The check that the tables in the database are what this version needs.

A service may run on tables that a newer version has upgraded already, since revisions only add.
"""

from __future__ import annotations

from pkgutil import iter_modules

from sqlalchemy import Connection, Engine, inspect, select
from sqlalchemy.engine.reflection import Inspector

from celery_eda.errors import SchemaOutdated
from celery_eda.migrations import versions
from celery_eda.tables import Tables

REMEDY = "Run `celery -A <app> eda db upgrade`, or have a DBA run what `eda db sql` prints."


def revisions() -> list[str]:
    """All revisions of the tables, the oldest first.

    By the names of their files: to read them takes Alembic, which no worker has any use for.
    """
    return sorted(name[1:].partition("_")[0] for _, name, _ in iter_modules(versions.__path__))


def check(engine: Engine, tables: Tables) -> None:
    """Make sure that *tables* are there and are what this version needs.

    Tables that a project's own migrations made carry no version; they are known by their columns.

    Raises:
        SchemaOutdated: they are missing or too old.
    """
    known = revisions()
    with engine.connect() as connection:
        inspector = inspect(connection)
        version = _version(connection, inspector, tables)
        if version == known[-1]:
            return
        if version in known:
            raise SchemaOutdated(
                f"The tables {tables.prefix}* are of version {version}, and version "
                f"{known[-1]} is needed. {REMEDY}"
            )
        if missing := _missing(inspector, tables):
            raise SchemaOutdated(f"{engine.url!r} lacks {', '.join(missing)}. {REMEDY}")


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
