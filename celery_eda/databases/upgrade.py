"""Creation and upgrade of the tables by Alembic, or as printed DDL.

Upgrading twice, or from two machines at once, is harmless.
"""

from __future__ import annotations

import io
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine

from celery_eda.databases import schema
from celery_eda.databases.registry import dialect_of
from celery_eda.databases.tables import Tables


def upgrade(engine: Engine, tables: Tables) -> None:
    """Create *tables* or bring them up to date, in one transaction where DDL is transactional.

    Waits for another upgrade of the same tables to end.

    Raises:
        SchemaOutdated: the other upgrade did not end in time, or the tables belong to a version
            that this one does not know.
    """
    dialect = dialect_of(engine.url)
    with engine.begin() as connection, dialect.exclusive(connection, str(tables.version)):
        schema.refuse_unknown_version(connection, tables)
        command.upgrade(_config(tables, connection=connection), "head")


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
