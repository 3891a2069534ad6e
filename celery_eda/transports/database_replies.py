"""Replies over a database: queues that are there for as long as the process that takes from them.

A reply to a process that is gone finds no queue, and goes nowhere.
"""

from __future__ import annotations

import select
import socket
from contextlib import suppress
from typing import Any

from celery_eda.queues import BY_NAME
from celery_eda.transports.database_broker import Broker
from celery_eda.transports.database_channel import AT_ONCE, payload_of
from celery_eda.transports.database_taker import Busy, Taker


def declare(app: Any, name: str, expires: float) -> None:
    """Make the queue *name*; who opens it has it from then on."""
    with app.pool.acquire_channel(block=True) as (_, channel):
        channel.queue_declare(name)


class Replies:
    """The queues of one process, over one connection."""

    def __init__(self, app: Any, *, expires: float) -> None:
        self._broker = app.connection_for_read()
        self._channel: Any = None
        self._taker: Taker | None = None
        self._names: list[str] = []
        self._alarm, self._bell = socket.socketpair()
        self._alarm.setblocking(False)
        self._bell.setblocking(False)

    def open(self, name: str) -> None:
        taker = self._present()
        with taker.broker.engine.begin() as connection:
            taker.queues.bind(connection, name, BY_NAME, name, taker.id, takes_over=True)
        self._names.append(name)

    def close(self, name: str) -> None:
        self._names.remove(name)
        taker = self._present()
        with taker.broker.engine.begin() as connection:
            taker.queues.drop(connection, [name])

    def take(self, timeout: float) -> list[Any]:
        taker = self._present()
        if not (found := self._taken(taker)):
            self._wait(taker, timeout)
            with suppress(Busy):
                taker.sweep()
            found = self._taken(taker)
        return [self._read(row) for row in found]

    def wake(self) -> None:
        with suppress(OSError):  # it rings already, or nobody is there
            self._bell.send(b"!")

    def drop(self) -> None:
        if self._taker is not None:
            self._taker.end()
            self._taker = None
        self._broker.collect()
        self._alarm.close()
        self._bell.close()

    def _present(self) -> Taker:
        if self._taker is None:
            self._channel = self._broker.default_channel
            broker: Broker = self._channel.broker
            self._taker = Taker(broker)
        return self._taker

    def _taken(self, taker: Taker) -> list[Any]:
        try:
            with taker.transaction() as connection:
                return [
                    row for name in self._names for row in taker.take(connection, name, AT_ONCE)
                ]
        except Busy:  # nothing was taken; the next time, then
            return []

    def _wait(self, taker: Taker, timeout: float) -> None:
        """Until somebody has put something into a queue, or the bell rings."""
        if (told := taker.woken()) is None or told:
            return
        bell = self._alarm.fileno()
        readable, _, _ = select.select([taker.fileno(), bell], [], [], timeout)
        if bell in readable:
            self._alarm.recv(4096)

    def _read(self, row: Any) -> Any:
        try:
            return self._channel.Message(payload_of(row), channel=self._channel)
        except Exception:
            return None
