"""The databases that the tests run on: one fixture, one body of tests, every vendor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, make_url

from celery_eda.databases import upgrade
from celery_eda.databases.registry import Dialect, dialect_of
from celery_eda.databases.tables import Tables

VENDORS = ("postgresql", "mariadb", "sqlite")
#: Those in which a claim is a row lock, and ends with its connection.
LOCKING = ("postgresql", "mariadb")


@dataclass(frozen=True)
class Database:
    """A new, empty database, reached as the road reaches it.

    Attributes:
        vendor: its name, as in ``VENDORS``.
        tables: those of a service; not created yet.
    """

    vendor: str
    engine: Engine
    dialect: Dialect
    tables: Tables

    def again(self, *, claim_timeout: float) -> Database:
        """The same database with another time-out and connections of its own."""
        return connect(self.vendor, self.engine.url.render_as_string(False), claim_timeout)


def connect(vendor: str, url: str, claim_timeout: float = 60) -> Database:
    """The database at *url*, with an engine as ``EDA`` makes it."""
    dialect = dialect_of(make_url(url), claim_timeout=claim_timeout)
    engine = create_engine(url, **dialect.engine_options(dialect.claim_timeout))
    dialect.configure_engine(engine, dialect.claim_timeout)
    return Database(vendor, engine, dialect, Tables.on())


@pytest.fixture(params=VENDORS)
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A new database without tables."""
    vendor = request.param
    if vendor == "sqlite":
        url = f"sqlite:///{tmp_path / 'service.db'}"
    else:
        url = request.getfixturevalue(f"{vendor}_url")
    database = connect(vendor, url)
    yield database
    database.engine.dispose()


@pytest.fixture(scope="session")
def upgraded_databases() -> Iterator[dict[str, Database]]:
    """Those that have tables already, by vendor: to make one takes longer than most tests."""
    databases: dict[str, Database] = {}
    yield databases
    for database in databases.values():
        database.engine.dispose()


@pytest.fixture(params=VENDORS)
def database(
    request: pytest.FixtureRequest,
    upgraded_databases: dict[str, Database],
    tmp_path_factory: pytest.TempPathFactory,
) -> Database:
    """A database with the tables of a service, without a row."""
    vendor = request.param
    server = None if vendor == "sqlite" else request.getfixturevalue(vendor)
    if server:
        server.start()  # an earlier test may have killed it
    if vendor not in upgraded_databases:
        file = f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'service.db'}"
        new = connect(vendor, server.database("shared") if server else file)
        upgrade.upgrade(new.engine, new.tables)
        upgraded_databases[vendor] = new
    database = upgraded_databases[vendor]
    with database.engine.begin() as connection:
        for table in database.tables.all:
            connection.execute(table.delete())
    return database
