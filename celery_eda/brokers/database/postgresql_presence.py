"""The presence of a taker on PostgreSQL: a lock of its connection, and a channel that wakes it.

The taker leases messages over this same connection. When the server ends the connection, the lock
is free and the taker can lease nothing more: no taker that counts as dead still leases messages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from uuid import uuid4
from zlib import crc32

from sqlalchemy import Connection, func, select, text

from celery_eda.databases import Tables
from celery_eda.errors import ConfigurationError

_ID = re.compile("[0-9]{1,18}")


def key_of(tables: Tables) -> int:
    """The first half of the key of a taker's advisory lock; the taker's id is the second half."""
    return crc32(tables.takers.fullname.encode()) - 2**31


def channel_of(tables: Tables) -> str:
    """The channel that announces free messages."""
    return f"celery_eda_{crc32(tables.queue.fullname.encode()):08x}"


def note_of(queue: str, id_: int) -> str:
    """The payload of a notification: the lowest free id, and its queue."""
    return f"{id_} {queue}"


class Listening:
    """The presence of one taker, on the connection that announces it."""

    def __init__(self, tables: Tables) -> None:
        self.name = uuid4().hex
        self._tables = tables
        self._driver: Any = None
        self._notified: dict[str, int] = {}

    def announce(self, connection: Connection, taker: int) -> None:
        self._driver = connection.connection.driver_connection
        require_direct(connection, self._driver.pgconn.backend_pid)
        # Notifications that arrive while a statement runs go to this handler only.
        self._driver.add_notify_handler(lambda each: self._receive(each.payload))
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
                self._receive(note.extra.decode(errors="replace"))
        except Exception as error:
            raise ConnectionResetError(f"the connection that listens is lost: {error}") from error
        notified, self._notified = self._notified, {}
        return notified

    def _receive(self, note: str) -> None:
        """Remember a note of :func:`note_of`; others are ignored, since any role may notify."""
        text, _, queue = note.partition(" ")
        if queue and _ID.fullmatch(text):
            self._notified[queue] = min(int(text), self._notified.get(queue, int(text)))

    def missed(self, connection: Connection) -> bool:
        return False

    def disown(self) -> None:
        # Not closed: libpq would send the parent's goodbye to the server.
        if self._driver is not None and not self._driver.closed:
            _detach(self._driver.fileno())

    def end(self) -> None:
        if self._driver is not None:
            self._driver.close()


def require_direct(connection: Connection, reported: int) -> None:
    """Refuse a pooler: the server process *reported* to the driver is not the one that answers.

    Raises:
        ConfigurationError: there is a pooler.
    """
    if connection.scalar(select(func.pg_backend_pid())) != reported:
        raise ConfigurationError(
            "A pooler such as pgbouncer is between this process and PostgreSQL. It shares each "
            "connection among clients, so that locks outlive their owners and no consumer is "
            "woken. Set broker_url to the address of PostgreSQL itself, or set "
            "broker_transport_options = {'heartbeat': 30}: then a worker that is silent for 30 s "
            "counts as dead and its messages are redelivered, even if a task is still running, "
            "and queues are polled four times a second."
        )


def _detach(descriptor: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nothing, descriptor, inheritable=False)
    os.close(nothing)
