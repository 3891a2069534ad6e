"""A service whose transactions the tests join: a table of its own, an outbox, and publishing."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import Connection, String, delete, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from celery_eda.core import context
from celery_eda.core.message import Message
from celery_eda.outbox.store import OutboxStore
from tests.support.databases import VENDORS, Database, connect
from tests.support.messages import message
from tests.support.outboxes import stand_in_outbox


class Base(DeclarativeBase):
    """What the service maps."""


ASYNC_DRIVERS = ("postgresql+psycopg", "postgresql+asyncpg", "sqlite+aiosqlite")
_numbers = itertools.count(1)


class Order(Base):
    """A row of the service's own work."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True, default=lambda: next(_numbers))
    name: Mapped[str] = mapped_column(String(50), unique=True)


@dataclass
class Service:
    """A service on one database.

    Attributes:
        handed_off: names of the messages whose ids were handed to the sender.
        outside: names of the messages published outside any transaction.
        stored_apart: names of the messages stored in a short transaction of their own.
    """

    database: Database
    handed_off: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    stored_apart: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = self.database.engine
        self.outbox = OutboxStore(self.database.tables.outbox, self.database.dialect)
        self.store = stand_in_outbox(self._add, self._hand_off, self.store_apart, self.engine)
        self._names: dict[int, str] = {}

    def publish(self, name: str) -> None:
        """What ``.delay()`` comes down to."""
        if transaction := context.current_transaction():
            transaction.capture(message(name))
        else:
            self.outside.append(name)

    @property
    def sent(self) -> str:
        """Names of all messages in the outbox, as another connection sees it, sorted."""
        with self.engine.connect() as connection:
            return "".join(sorted(connection.scalars(select(self.outbox.table.c.task))))

    @property
    def orders(self) -> str:
        """Names of all committed orders, sorted."""
        with self.engine.connect() as connection:
            return "".join(sorted(connection.scalars(select(Order.name))))

    @property
    def handed_off_in_order(self) -> str:
        """The names of ``handed_off``, as ``sent`` spells them."""
        return "".join(sorted(self.handed_off))

    def store_apart(self, messages: Sequence[Message]) -> None:
        """Write *messages* in a transaction of their own."""
        self.stored_apart += [each.task for each in messages]
        with self.engine.begin() as connection:
            ids = self._add(connection, messages)
        self._hand_off(ids)

    def _add(self, connection: Connection, messages: Sequence[Message]) -> list[int]:
        ids = self.outbox.add(connection, messages)
        self._names.update(zip(ids, (each.task for each in messages), strict=True))
        return ids

    def _hand_off(self, ids: list[int]) -> None:
        self.handed_off += [self._names[each] for each in ids]


@dataclass
class AsyncService(Service):
    """A service that also reaches its database through an asyncio driver."""

    driver: str = ""

    def run(self, body: Callable[[AsyncEngine], Coroutine[Any, Any, None]]) -> None:
        """Run *body* in an event loop of its own."""

        async def run() -> None:
            engine = create_async_engine(self.engine.url.set(drivername=self.driver))
            self.database.dialect.configure_engine(engine.sync_engine, 60)
            await body(engine)
            await engine.dispose()

        asyncio.run(run())


@contextmanager
def made(vendor: str, request: pytest.FixtureRequest) -> Iterator[Database]:
    """A new database with all tables."""
    if vendor == "sqlite":
        folder = request.getfixturevalue("tmp_path_factory").mktemp("sqlite")
        database = connect(vendor, f"sqlite:///{folder / 'service.db'}")
    else:
        server = request.getfixturevalue(vendor)
        server.start()
        name = f"unit{next(_numbers)}"
        database = connect(vendor, server.database(name))
        request.addfinalizer(lambda: server.drop(name))
    database.tables.metadata.create_all(database.engine)
    Base.metadata.create_all(database.engine)
    yield database
    database.engine.dispose()


def clear(service: Service) -> None:
    """Leave the tables empty for the next test."""
    with service.engine.begin() as connection:
        connection.execute(delete(service.outbox.table))
        connection.execute(delete(Order))


def some_of(*vendors: str) -> list[Any]:
    """These in every run, the others in soak: ``the tests of stores`` holds what differs."""
    return [
        each if each in vendors else pytest.param(each, marks=pytest.mark.soak) for each in VENDORS
    ]


@pytest.fixture(scope="module", params=some_of("postgresql", "sqlite"))
def shared_database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """One database for the tests of a module."""
    with made(request.param, request) as database:
        yield database


@pytest.fixture
def service(shared_database: Database) -> Iterator[Service]:
    """A service with empty tables, on each database."""
    service = Service(shared_database)
    yield service
    clear(service)


@pytest.fixture(scope="module", params=ASYNC_DRIVERS)
def shared_async_database(request: pytest.FixtureRequest) -> Iterator[tuple[Database, str]]:
    """One database for the asynchronous tests of a module, and the driver to reach it with."""
    with made(request.param.split("+")[0], request) as database:
        yield database, request.param


@pytest.fixture
def async_service(shared_async_database: tuple[Database, str]) -> Iterator[AsyncService]:
    """A service with empty tables, on each database, through each asyncio driver."""
    database, driver = shared_async_database
    service = AsyncService(database, driver=driver)
    yield service
    clear(service)
