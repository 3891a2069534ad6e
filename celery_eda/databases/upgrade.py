"""Creation and upgrade of the tables by Alembic, or as printed DDL.

Upgrading twice, or from two machines at once, is harmless.
"""

from __future__ import annotations

import io
import time
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from celery_eda.core.retry import delays
from celery_eda.databases import schema
from celery_eda.databases.registry import dialect_of
from celery_eda.databases.tables import Tables
from celery_eda.errors import SchemaOutdated

#: Seconds for which a change of a table that is in use is repeated.
PATIENCE = 120.0
#: Seconds between two tries: first, longest.
PAUSES = (0.1, 2.0)


def upgrade(engine: Engine, tables: Tables, patience: float = PATIENCE) -> None:
    """Create *tables* or bring them up to date, while the service works.

    Each table is changed in a transaction of its own, which waits only briefly for others that use
    the table, and is repeated for *patience* seconds. Waits for another upgrade of the same tables
    to end.

    Raises:
        SchemaOutdated: the other upgrade, or a transaction that uses a table, did not end in time;
            or the tables belong to a version that this one does not know.
    """
    dialect = dialect_of(engine.url)
    with engine.connect() as connection:
        schema.refuse_unknown_version(connection, tables)
    with dialect.migration(engine, str(tables.version)) as connection:
        give_up = time.monotonic() + patience
        for pause in delays(*PAUSES):
            try:
                command.upgrade(_config(tables, connection=connection), "head")
                return
            except DBAPIError as error:
                if not dialect.is_transient(error):
                    raise
                connection.rollback()
                if time.monotonic() > give_up:
                    raise SchemaOutdated(
                        f"A table of {tables.prefix}* could not be changed for {patience:g} s, "
                        f"because a transaction uses it: {error.orig}. End the transactions that "
                        "take so long, then run `celery -A <app> eda db upgrade` again: it goes on "
                        "where it was."
                    ) from error
            time.sleep(pause)


def sql(engine: Engine, tables: Tables) -> str:
    """The DDL that creates *tables*, as text, without a connection to the database."""
    output = io.StringIO()
    command.upgrade(_config(tables, url=engine.url, output=output), "head", sql=True)
    return output.getvalue()


def _config(tables: Tables, *, output: io.StringIO | None = None, **attributes: Any) -> Config:
    config = Config(output_buffer=output, attributes={"tables": tables, **attributes})
    config.set_main_option("script_location", "celery_eda.databases:migrations")
    config.set_main_option("path_separator", "os")
    return config
