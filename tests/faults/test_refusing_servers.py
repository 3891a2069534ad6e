"""A database that refuses to write, or has no room, is an outage: no message is lost or fails.

Nothing dies here: the server answers every statement, with an error.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from sqlalchemy import Connection, create_engine, insert, make_url, text
from sqlalchemy.exc import DBAPIError

from tests.faults.conftest import Process, Road, expect_hits
from tests.faults.programs.tables import effects
from tests.support.servers.disk import SmallDisk, small_disk
from tests.support.servers.mariadb import MariaDB
from tests.support.servers.postgresql import PostgreSQL, owner

NUMBERS = 40
ALL = Counter(range(NUMBERS))
#: How often messages are given back to the broker before the server writes again.
GIVEN_BACK = 8
IMPATIENT = {"eda_outage_patience": 1.0, "eda_max_deliveries": 2}


@contextmanager
def administrator(url: str) -> Iterator[Connection]:
    """A connection that commits each statement."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.fixture
def on_postgresql(rabbitmq_url: str, postgresql_url: str, tmp_path: Path) -> Iterator[Road]:
    road = Road(rabbitmq_url, postgresql_url, tmp_path)
    yield road
    road.end()


@pytest.fixture
def on_mariadb(
    redis_url: str, mariadb: MariaDB, mariadb_url: str, tmp_path: Path
) -> Iterator[Road]:
    """Its processes log in as a user without privileges of an administrator."""
    road = Road(redis_url, mariadb_url, tmp_path)
    url = make_url(mariadb_url)
    with administrator(mariadb.url) as connection:
        connection.execute(text("CREATE USER IF NOT EXISTS 'road'@'%'"))
        connection.execute(text(f"GRANT ALL ON `{url.database}`.* TO 'road'@'%'"))
    road.environment["ROAD_DATABASE"] = url.set(username="road").render_as_string(False)
    yield road
    road.end()


def put_into_the_queue(road: Road) -> None:
    """Have all messages on the broker, and no process that uses the database."""
    road.run(f"with eda.transaction():\n for number in range({NUMBERS}): charge.delay(number)")
    relay = road.relay()
    road.until(lambda: road.waiting() == 0, "all messages on the broker")
    relay.kill()


def start_worker(road: Road, mutation: str = "", **settings: object) -> Process:
    environment = {"ROAD_SETTINGS": json.dumps({**IMPATIENT, **settings})}
    return road.worker(ROAD_MUTATION=mutation, **environment)


def until_given_back(road: Road) -> None:
    road.until(lambda: road.logged("requeue=True") >= GIVEN_BACK, "messages given back")


def expect_all(road: Road) -> None:
    """Each message took effect once, and none failed."""
    road.until(lambda: road.effects() == ALL or len(road.effects()) > NUMBERS, "all effects")
    road.settle(3.0)

    assert road.effects() == ALL
    assert road.dead() == []


# ── read-only ───────────────────────────────────────────────────────────────────────────────────


@contextmanager
def a_read_only_server(road: Road, server: PostgreSQL) -> Iterator[None]:
    """Also for the connections that are open."""
    with administrator(server.url) as connection:
        connection.execute(text("ALTER SYSTEM SET default_transaction_read_only = on"))
        connection.execute(text("SELECT pg_reload_conf()"))
        try:
            yield
        finally:
            connection.execute(text("ALTER SYSTEM RESET default_transaction_read_only"))
            connection.execute(text("SELECT pg_reload_conf()"))


@contextmanager
def a_read_only_database(road: Road, server: PostgreSQL) -> Iterator[None]:
    """For the connections that are opened meanwhile, which stay read-only afterwards."""
    name = make_url(road.database).database
    change = f'ALTER DATABASE "{name}" SET default_transaction_read_only'
    with administrator(server.url) as connection:
        connection.execute(text(f"{change} = on"))
        try:
            yield
        finally:
            connection.execute(text(f"{change} = off"))


ReadOnly = Callable[[Road, PostgreSQL], AbstractContextManager[None]]


@pytest.mark.parametrize("read_only", [a_read_only_server, a_read_only_database])
def test_a_postgresql_that_is_read_only_for_a_while_loses_nothing(
    on_postgresql: Road, postgresql: PostgreSQL, read_only: ReadOnly
) -> None:
    put_into_the_queue(on_postgresql)
    with read_only(on_postgresql, postgresql):
        start_worker(on_postgresql)
        until_given_back(on_postgresql)

    expect_all(on_postgresql)
    expect_hits(on_postgresql.logged("read-only transaction"), "refused statements")


def test_a_postgresql_that_becomes_read_only_under_its_workers_and_relays_loses_nothing(
    on_postgresql: Road, postgresql: PostgreSQL
) -> None:
    road = on_postgresql
    start_worker(road)
    road.relay()
    put_into_the_queue(road)
    road.until(road.effects, "the first effects")
    with a_read_only_server(road, postgresql):
        road.pause(4, "workers and relays are refused")

    expect_all(road)


@contextmanager
def a_read_only_mariadb(server: MariaDB) -> Iterator[None]:
    with administrator(server.url) as connection:
        connection.execute(text("SET GLOBAL read_only = 1"))
        try:
            yield
        finally:
            connection.execute(text("SET GLOBAL read_only = 0"))


def test_a_mariadb_that_is_read_only_for_a_while_loses_nothing(
    on_mariadb: Road, mariadb: MariaDB
) -> None:
    put_into_the_queue(on_mariadb)
    with a_read_only_mariadb(mariadb):
        start_worker(on_mariadb)
        until_given_back(on_mariadb)

    expect_all(on_mariadb)
    expect_hits(on_mariadb.logged("--read-only option"), "refused statements")


def test_if_a_refusal_were_a_failure_messages_would_be_lost(
    on_postgresql: Road, postgresql: PostgreSQL
) -> None:
    road = on_postgresql
    put_into_the_queue(road)
    with a_read_only_server(road, postgresql):
        start_worker(road, "refused_statements_fail_messages")
        road.until(lambda: road.logged("raised unexpected") >= GIVEN_BACK, "failures")

    road.until(lambda: not unfinished(road), "the end of all messages")
    assert len(road.effects()) < NUMBERS
    assert road.dead() == []


def unfinished(road: Road) -> int:
    """Messages that a worker has received and neither handled nor failed."""
    ended = road.logged("succeeded in") + road.logged("raised unexpected")
    return NUMBERS - ended


# ── time limits ─────────────────────────────────────────────────────────────────────────────────


#: Deliveries wait for the database longer than a handler may take.
PATIENT = {"eda_outage_patience": 60.0, "task_soft_time_limit": 1}


def outlive_a_soft_time_limit(road: Road, mutation: str = "") -> None:
    start_worker(road, mutation, **PATIENT)
    until_limited(road)


def until_limited(road: Road) -> None:
    road.until(lambda: road.logged("Soft time limit") >= GIVEN_BACK, "time limits")


def test_a_soft_time_limit_during_an_outage_loses_nothing(
    on_postgresql: Road, postgresql: PostgreSQL
) -> None:
    put_into_the_queue(on_postgresql)
    with a_read_only_server(on_postgresql, postgresql):
        outlive_a_soft_time_limit(on_postgresql)

    expect_all(on_postgresql)


def test_a_soft_time_limit_while_mariadb_is_away_loses_nothing(
    on_mariadb: Road, mariadb: MariaDB
) -> None:
    worker = start_worker(on_mariadb, **PATIENT)
    on_mariadb.until(lambda: on_mariadb.logged(" ready."), "the worker, which needs the database")
    worker.signal(signal.SIGSTOP)
    put_into_the_queue(on_mariadb)
    mariadb.stop()
    worker.signal(signal.SIGCONT)
    until_limited(on_mariadb)
    mariadb.start()

    expect_all(on_mariadb)


def test_if_celery_heard_of_the_limit_messages_would_be_lost(
    on_postgresql: Road, postgresql: PostgreSQL
) -> None:
    road = on_postgresql
    put_into_the_queue(road)
    with a_read_only_server(road, postgresql):
        outlive_a_soft_time_limit(road, "errors_of_ours_are_told_to_celery")

    road.until(lambda: not unfinished(road), "the end of all messages")
    assert len(road.effects()) < NUMBERS


# ── no room ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def full_postgresql(
    rabbitmq_url: str, postgresql: PostgreSQL, servers_folder: Path, tmp_path: Path
) -> Iterator[tuple[Road, SmallDisk]]:
    """A database on a small disk, whose tables have not a page yet."""
    postgresql.start()
    folder = servers_folder / "small"
    folder.mkdir()
    with small_disk(folder, 24) as disk:
        space = folder / "space"
        space.mkdir()
        if user := owner():
            shutil.chown(space, user)
        with administrator(postgresql.url) as connection:
            connection.execute(text(f"CREATE TABLESPACE small LOCATION '{space}'"))
            connection.execute(text("CREATE DATABASE small TABLESPACE small"))
            road = Road(rabbitmq_url, postgresql.url.rpartition("/")[0] + "/small", tmp_path)
            yield road, disk
            road.end()
            disk.free()
            connection.execute(text("DROP DATABASE small WITH (FORCE)"))
            connection.execute(text("DROP TABLESPACE small"))
    folder.rmdir()


@pytest.fixture
def full_mariadb(
    redis_url: str, mariadb: MariaDB, mariadb_url: str, tmp_path: Path
) -> Iterator[tuple[Road, SmallDisk]]:
    with administrator(mariadb_url) as connection:
        data = Path(connection.scalar(text("SELECT @@datadir")) or "")
    folder = data / (make_url(mariadb_url).database or "")
    with small_disk(folder, 16) as disk:
        road = Road(redis_url, mariadb_url, tmp_path)
        yield road, disk
        road.end()
        disk.free()
        with administrator(mariadb_url) as connection:
            road.tables.metadata.drop_all(connection)
            effects.metadata.drop_all(connection)


@pytest.fixture
def full_sqlite(redis_url: str, tmp_path: Path) -> Iterator[tuple[Road, SmallDisk]]:
    folder = tmp_path / "small"
    folder.mkdir()
    with small_disk(folder, 8) as disk:
        road = Road(redis_url, f"sqlite:///{folder / 'road.db'}", tmp_path)
        yield road, disk
        road.end()


@pytest.fixture(params=["full_postgresql", "full_mariadb", "full_sqlite"])
def small(request: pytest.FixtureRequest) -> tuple[Road, SmallDisk]:
    """A system on a database with a small disk."""
    system: tuple[Road, SmallDisk] = request.getfixturevalue(request.param)
    return system


def run_out_of_room(road: Road, disk: SmallDisk, mutation: str = "") -> None:
    """Messages are handled until no row fits any more."""
    put_into_the_queue(road)
    disk.fill()
    for rows in (100, 10, 1):
        with pytest.raises(DBAPIError, match=r"full|space"):
            insert_for_ever(road, rows)
    start_worker(road, mutation)


def insert_for_ever(road: Road, rows: int) -> NoReturn:
    """Commit so many rows at once, again and again."""
    while True:
        with road.engine.begin() as connection:
            connection.execute(insert(effects), [{"name": "x" * 40, "number": 0}] * rows)


def test_a_full_disk_loses_nothing_and_makes_no_dead_letter(small: tuple[Road, SmallDisk]) -> None:
    road, disk = small
    run_out_of_room(road, disk)
    until_given_back(road)
    disk.free()

    expect_all(road)


@pytest.mark.parametrize("small", ["full_postgresql"], indirect=True)
def test_if_a_full_disk_were_a_failure_messages_would_be_dead_letters(
    small: tuple[Road, SmallDisk],
) -> None:
    road, disk = small
    run_out_of_room(road, disk, "refused_statements_fail_messages")
    road.until(lambda: road.logged("raised unexpected") >= GIVEN_BACK, "failures")
    disk.free()

    road.until(lambda: not unfinished(road), "the end of all messages")
    assert len(road.effects()) < NUMBERS
