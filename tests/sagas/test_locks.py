"""Semantic locks of sagas: one has it, the others stand in line, on each database."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
from sqlalchemy import Connection, select
from sqlalchemy.exc import DBAPIError

from celery_eda.sagas.locks import SagaLocks
from tests.support.databases import LOCKING, Database

T = TypeVar("T")


@pytest.fixture
def locks(database: Database) -> SagaLocks:
    return SagaLocks(database.tables.saga_locks, database.dialect)


def line(database: Database, key: str) -> list[str]:
    """Who has *key*, and who waits for it, in order."""
    columns = database.tables.saga_locks.c
    query = select(columns.saga).where(columns.key == key).order_by(columns.place)
    with database.engine.connect() as connection:
        return list(connection.scalars(query))


def test_one_has_it_and_the_next_in_line_gets_it(database: Database, locks: SagaLocks) -> None:
    with database.engine.begin() as connection:
        assert locks.acquire(connection, "seat", "a", saga="a", record=1)
        assert not locks.acquire(connection, "seat", "b", saga="b/part", record=3)
        assert not locks.acquire(connection, "seat", "c", saga="c", record=2)
        assert locks.acquire(connection, "seat", "a", saga="a/part", record=4), "it has it already"
        assert locks.acquire(connection, "other", "b", saga="b", record=5)
    assert line(database, "seat") == ["a", "c", "b/part"]

    with database.engine.begin() as connection:
        assert locks.release(connection, "a") == [("c", 2)]
    assert line(database, "seat") == ["c", "b/part"]
    with database.engine.begin() as connection:
        assert locks.release(connection, "b") == [], "it leaves the line, and what nobody wants"
        assert locks.release(connection, "c") == []

    assert line(database, "seat") == line(database, "other") == []


@pytest.mark.parametrize("database", LOCKING, indirect=True)
def test_who_stands_in_line_while_another_goes_is_not_overlooked(
    database: Database, locks: SagaLocks
) -> None:
    with database.engine.begin() as connection:
        locks.acquire(connection, "seat", "a", saga="a", record=1)
    standing = threading.Event()

    def stand() -> None:
        with database.engine.begin() as connection:
            assert not locks.acquire(connection, "seat", "b", saga="b", record=2)
            standing.set()
            time.sleep(0.5)  # the other one is to come meanwhile

    def go() -> list[tuple[str, int]]:
        standing.wait(30)
        with database.engine.begin() as connection:
            return locks.release(connection, "a")

    with ThreadPoolExecutor() as pool:
        stood, gone = pool.submit(stand), pool.submit(go)
        stood.result()
        assert gone.result() == [("b", 2)]

    assert line(database, "seat") == ["b"]


def test_many_at_once_have_it_one_after_the_other(database: Database, locks: SagaLocks) -> None:
    """Each takes it, or is handed it by whoever goes; nobody has it twice or never."""
    had: list[str] = []

    def transition(act: Callable[[Connection], T]) -> T:
        """As a message is handled: again, if the database says that it lost a race."""
        while True:
            try:
                with database.engine.begin() as connection:
                    database.dialect.stop_writers(connection)
                    return act(connection)
            except DBAPIError as error:
                if not database.dialect.is_transient(error):
                    raise

    def run(number: int) -> None:
        name = f"saga {number}"
        mine = transition(lambda c: locks.acquire(c, "seat", name, saga=name, record=number + 1))
        while mine:
            had.append(name)
            heirs = transition(lambda c: locks.release(c, name))  # noqa: B023  # called at once
            mine = bool(heirs)
            name = heirs[0][0] if heirs else name

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(40)))

    assert sorted(had) == sorted(f"saga {number}" for number in range(40))
    assert line(database, "seat") == []
