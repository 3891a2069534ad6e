"""The check that the tables in the database fit this version.

A service may run on tables that a newer version has already upgraded, since revisions only add.
"""

from __future__ import annotations

from pkgutil import iter_modules

from sqlalchemy import Connection, Engine, inspect, select
from sqlalchemy.engine.reflection import Inspector

from celery_eda.databases.migrations import versions
from celery_eda.databases.tables import Tables
from celery_eda.errors import SchemaOutdated

REMEDY = "Run `celery -A <app> eda db upgrade`, or have a DBA run what `eda db sql` prints."


def revisions() -> list[str]:
    """Names of all revisions of the tables, the oldest first.

    A file's name is ``r`` and the revision's: reading the files would take Alembic, which a worker
    does not import.
    """
    return sorted(name.removeprefix("r") for _, name, _ in iter_modules(versions.__path__))


def check(engine: Engine, tables: Tables) -> None:
    """Make sure that *tables* exist and fit this version.

    Tables created by a project's own migrations have no recorded version: their columns are
    compared instead.

    Raises:
        SchemaOutdated: the tables are missing or too old.
    """
    known = revisions()
    with engine.connect() as connection:
        inspector = inspect(connection)
        version = _version(connection, inspector, tables)
        if version == known[-1]:
            return
        if version in known:
            raise SchemaOutdated(
                f"The tables {tables.prefix}* are of version {version}, but version "
                f"{known[-1]} is needed. {REMEDY}"
            )
        if missing := _missing(inspector, tables):
            raise SchemaOutdated(f"{engine.url!r} lacks {', '.join(missing)}. {REMEDY}")


def refuse_unknown_version(connection: Connection, tables: Tables) -> None:
    """Refuse to upgrade tables whose recorded version has no revision here.

    Raises:
        SchemaOutdated: a newer version has upgraded the tables, or one before 0.1.0 made them.
    """
    version = _version(connection, inspect(connection), tables)
    if version is not None and version not in revisions():
        raise SchemaOutdated(
            f"The tables {tables.prefix}* are of version {version}, which this release does not "
            f"know. If a newer release has upgraded them, upgrade celery_eda. If they were made "
            f"before 0.1.0, drop all tables {tables.prefix}* and run "
            f"`celery -A <app> eda db upgrade` again."
        )


def _version(connection: Connection, inspector: Inspector, tables: Tables) -> str | None:
    if not inspector.has_table(tables.version.name, tables.schema):
        return None
    return connection.scalar(select(tables.version.c.version_num))


def _missing(inspector: Inspector, tables: Tables) -> list[str]:
    """Names of missing tables, and of missing columns as ``table.column``."""
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
