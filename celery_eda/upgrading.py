"""The tables in the database: made by Alembic, or printed for those who make them by hand.

Upgrading twice, or from two machines at once, is harmless.
"""

from __future__ import annotations

import io
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine

from celery_eda.dialects import dialect_of
from celery_eda.tables import Tables


def upgrade(engine: Engine, tables: Tables) -> None:
    """Create *tables* or bring them up to date, in a transaction where the database has them.

    Another upgrade of the same tables is waited for.

    Raises:
        SchemaOutdated: the other upgrade did not end in time.
    """
    dialect = dialect_of(engine.url)
    with engine.begin() as connection, dialect.exclusive(connection, str(tables.version)):
        command.upgrade(_config(tables, connection=connection), "head")


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
