"""The servers as pytest fixtures: each started once, on first use, with fresh databases per test.

Where a server is missing the test is skipped with the reason, or fails if the environment says
``CELERY_EDA_REQUIRE_SERVERS=1``. A test may stop, kill or freeze a server: the next test that
asks for a fresh database finds it running again.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import pytest

from tests.support.servers.base import Server
from tests.support.servers.errors import ServerUnavailable
from tests.support.servers.mariadb import MariaDB
from tests.support.servers.pgbouncer import PgBouncer
from tests.support.servers.postgresql import PostgreSQL
from tests.support.servers.rabbitmq import RabbitMQ
from tests.support.servers.redis import DATABASES, Redis, program
from tests.support.servers.sentinel import Sentinel

AnyServer = TypeVar("AnyServer", bound=Server)

_numbers = itertools.count(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    """Skip a test whose fixtures find no server."""
    try:
        return (yield)
    except ServerUnavailable as unavailable:
        _skip(unavailable)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Skip a test that wants to kill a server which is not ours."""
    try:
        return (yield)
    except ServerUnavailable as unavailable:
        _skip(unavailable)


def _skip(unavailable: ServerUnavailable) -> NoReturn:
    if os.environ.get("CELERY_EDA_REQUIRE_SERVERS") == "1":
        pytest.fail(f"{unavailable} (CELERY_EDA_REQUIRE_SERVERS=1)", pytrace=False)
    pytest.skip(str(unavailable))


@pytest.fixture(scope="session")
def servers_folder() -> Iterator[Path]:
    """Where the servers keep their data until the tests are over."""
    # Not pytest's own: only its owner may enter that, and PostgreSQL does not run as root.
    folder = Path(tempfile.mkdtemp(prefix="celery-eda-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def _running(kind: type[AnyServer], folder: Path) -> Iterator[AnyServer]:
    with kind.find(folder) as server:
        yield server


@pytest.fixture(scope="session")
def postgresql(servers_folder: Path) -> Iterator[PostgreSQL]:
    """A running PostgreSQL."""
    yield from _running(PostgreSQL, servers_folder)


@pytest.fixture(scope="session")
def mariadb(servers_folder: Path) -> Iterator[MariaDB]:
    """A running MariaDB."""
    yield from _running(MariaDB, servers_folder)


@pytest.fixture(scope="session")
def redis_server(servers_folder: Path) -> Iterator[Redis]:
    """A running Redis or Valkey."""
    yield from _running(Redis, servers_folder)


@pytest.fixture
def sentinel(servers_folder: Path) -> Iterator[Sentinel]:
    """A running Redis master with a replica, watched by a sentinel; new for each test."""
    with Sentinel.beside(servers_folder) as watched:
        yield watched


@pytest.fixture
def redis_cluster_url(servers_folder: Path) -> Iterator[str]:
    """The URL of the only node of a Redis Cluster."""
    if (executable := program()) is None:
        raise ServerUnavailable(f"No Redis here: install {Redis.packages}.")
    with Redis.node(executable, servers_folder, **{"cluster-enabled": "yes"}) as node:
        yield node.url


@pytest.fixture(scope="session")
def rabbitmq(servers_folder: Path) -> Iterator[RabbitMQ]:
    """A running RabbitMQ."""
    yield from _running(RabbitMQ, servers_folder)


@pytest.fixture
def postgresql_url(postgresql: PostgreSQL) -> Iterator[str]:
    """The SQLAlchemy URL of a new PostgreSQL database."""
    postgresql.start()
    name = str(next(_numbers))
    yield postgresql.database(name)
    postgresql.start()
    postgresql.drop(name)


@pytest.fixture(scope="session")
def pgbouncer(postgresql: PostgreSQL, servers_folder: Path) -> Iterator[PgBouncer]:
    """A running pgbouncer in transaction mode, before the PostgreSQL."""
    with PgBouncer.before(postgresql, servers_folder) as pooler:
        yield pooler


@pytest.fixture
def pgbouncer_url(pgbouncer: PgBouncer, postgresql_url: str) -> str:
    """The URL of a new PostgreSQL database, by way of a pooler."""
    pgbouncer.start()
    return pgbouncer.through(postgresql_url)


@pytest.fixture
def mariadb_url(mariadb: MariaDB) -> Iterator[str]:
    """The SQLAlchemy URL of a new MariaDB database."""
    mariadb.start()
    name = str(next(_numbers))
    yield mariadb.database(name)
    mariadb.start()
    mariadb.drop(name)


@pytest.fixture
def redis_url(redis_server: Redis) -> str:
    """The URL of an empty Redis database."""
    redis_server.start()
    return redis_server.database(next(_numbers) % DATABASES)


@pytest.fixture
def rabbitmq_url(rabbitmq: RabbitMQ) -> Iterator[str]:
    """The URL of a new RabbitMQ virtual host."""
    rabbitmq.start()
    name = f"test{next(_numbers)}"
    yield rabbitmq.vhost(name)
    rabbitmq.start()
    rabbitmq.drop(name)
