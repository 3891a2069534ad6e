"""A taker on PostgreSQL: a lock that belongs to its connection, and a channel that wakes it.

Messages are taken over this same connection. When the server ends it, the lock is free and
nothing more can be taken; so nobody holds messages who is thought to be gone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from uuid import uuid4
from zlib import crc32

from sqlalchemy import Connection, func, select, text

from celery_eda.errors import ConfigurationError
from celery_eda.tables import Tables


def key_of(tables: Tables) -> int:
    """The first half of the advisory locks of takers; the second is a taker's id."""
    return crc32(tables.takers.fullname.encode()) - 2**31


def channel_of(tables: Tables) -> str:
    """The channel that says where something was put."""
    return f"celery_eda_{crc32(tables.queue.fullname.encode()):08x}"


def note_of(queue: str, id_: int) -> str:
    """What is said there: the lowest id that can be taken, and its queue."""
    return f"{id_} {queue}"


class Listening:
    """One taker, on the connection that it is announced on."""

    def __init__(self, tables: Tables) -> None:
        self.name = uuid4().hex
        self._tables = tables
        self._driver: Any = None
        self._heard: dict[str, int] = {}

    def announce(self, connection: Connection, taker: int) -> None:
        self._driver = connection.connection.driver_connection
        require_direct(connection, self._driver.pgconn.backend_pid)
        # What comes while a statement runs is handed to the handler alone.
        self._driver.add_notify_handler(lambda each: self._hear(each.payload))
        connection.execute(select(func.pg_advisory_lock(key_of(self._tables), taker)))
        connection.execute(text(f"LISTEN {channel_of(self._tables)}"))

    def fileno(self) -> int:
        try:
            descriptor: int = self._driver.fileno()
        except Exception as error:
            raise ConnectionResetError(f"the connection that listens is lost: {error}") from error
        return descriptor

    def woken(self) -> Mapping[str, int]:
        connection = self._driver.pgconn
        try:
            connection.consume_input()
            while note := connection.notifies():
                self._hear(note.extra.decode())
        except Exception as error:
            raise ConnectionResetError(f"the connection that listens is lost: {error}") from error
        heard, self._heard = self._heard, {}
        return heard

    def _hear(self, note: str) -> None:
        id_, _, queue = note.partition(" ")
        self._heard[queue] = min(int(id_), self._heard.get(queue, int(id_)))

    def missed(self, connection: Connection) -> bool:
        return False

    def disown(self) -> None:
        # Not closed: libpq would say goodbye for the parent, to whatever has this number then.
        if self._driver is not None and not self._driver.closed:
            _let_go(self._driver.fileno())

    def end(self) -> None:
        if self._driver is not None:
            self._driver.close()


def require_direct(connection: Connection, said: int) -> None:
    """Refuse a pooler, which has *said* that the server process was one of its own making.

    Raises:
        ConfigurationError: there is one.
    """
    if connection.scalar(select(func.pg_backend_pid())) != said:
        raise ConfigurationError(
            "A pooler such as pgbouncer is between here and PostgreSQL. It hands one connection "
            "to many, so that locks outlive whose they are and nobody is woken. Give broker_url "
            "the address of PostgreSQL itself, or set broker_transport_options = "
            "{'heartbeat': 30}: then a worker that is silent for 30 s is taken for gone, which an "
            "ordinary task may not survive, and queues are looked into four times a second."
        )


def _let_go(descriptor: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nothing, descriptor, inheritable=False)
    os.close(nothing)
