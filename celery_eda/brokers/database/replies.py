"""Replies over a database: queues that live as long as the process that consumes them.

A reply to a process that has ended finds no queue and is dropped.
"""

from __future__ import annotations

import select
from contextlib import suppress
from typing import Any

from celery import Celery

from celery_eda.brokers.bell import Bell
from celery_eda.brokers.database.broker import DatabaseBroker
from celery_eda.brokers.database.channel import BATCH, payload_of
from celery_eda.brokers.database.queues import BY_NAME
from celery_eda.brokers.database.taker import Busy, Taker


def declare(app: Celery, name: str, expires: float) -> None:
    """Declare the queue *name*; the process that opens it becomes its owner."""
    with app.pool.acquire_channel(block=True) as (_, channel):
        channel.queue_declare(name)


class ReplyConsumer:
    """The reply queues of one process, over one connection. See ``brokers.base``."""

    def __init__(self, app: Celery, *, expires: float) -> None:
        self._broker = app.connection_for_read()
        self._channel: Any = None
        self._taker: Taker | None = None
        self._names: list[str] = []
        self._bell = Bell()

    def open(self, name: str) -> None:
        taker = self._ensure_taker()
        with taker.broker.engine.begin() as connection:
            taker.queues.bind(connection, name, BY_NAME, name, taker.id, takes_over=True)
        self._names.append(name)

    def close(self, name: str) -> None:
        self._names.remove(name)
        taker = self._ensure_taker()
        with taker.broker.engine.begin() as connection:
            taker.queues.drop(connection, [name])

    def take(self, timeout: float) -> list[Any]:
        taker = self._ensure_taker()
        if not (rows := self._claimed(taker)):
            self._wait(taker, timeout)
            with suppress(Busy):
                taker.sweep()
            rows = self._claimed(taker)
        return [self._read(row) for row in rows]

    def wake(self) -> None:
        self._bell.ring()

    def drop(self) -> None:
        if self._taker is not None:
            self._taker.end()
            self._taker = None
        self._broker.collect()
        self._bell.close()

    def _ensure_taker(self) -> Taker:
        if self._taker is None:
            self._channel = self._broker.default_channel
            broker: DatabaseBroker = self._channel.broker
            self._taker = Taker(broker)
        return self._taker

    def _claimed(self, taker: Taker) -> list[Any]:
        try:
            with taker.transaction() as connection:
                return [row for name in self._names for row in taker.take(connection, name, BATCH)]
        except Busy:  # the next call tries again
            return []

    def _wait(self, taker: Taker, timeout: float) -> None:
        """Wait until a message is put into a queue, or the bell rings."""
        if (woken_for := taker.woken()) is None or woken_for:
            return
        bell = self._bell.fileno()
        readable, _, _ = select.select([taker.fileno(), bell], [], [], timeout)
        if bell in readable:
            self._bell.reset()

    def _read(self, row: Any) -> Any:
        try:
            return self._channel.Message(payload_of(row), channel=self._channel)
        except Exception:
            return None
