"""Kombu's transport on a database: ``eda+sqlite:///file`` and ``eda+postgresql://…``.

It waits for what may be taken, in an event loop or without one. A worker takes more when it has
worked off half of what it may hold, or has nothing else to do.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from contextlib import suppress
from select import select
from time import monotonic
from typing import Any

from kombu.exceptions import ChannelError
from kombu.transport import virtual

from celery_eda.transports.database_broker import Broker, broker_at
from celery_eda.transports.database_channel import OUTAGES, REST, Channel
from celery_eda.transports.database_taker import Busy, Taker

#: Seconds that an acknowledgement waits for company.
COMPANY = 0.01


class Transport(virtual.Transport):
    """Connections to a database as broker."""

    Channel = Channel
    can_parse_url = True
    driver_type = "eda"
    driver_name = "celery_eda"
    connection_errors = OUTAGES
    channel_errors = (*virtual.Transport.channel_errors, ChannelError)
    implements = virtual.Transport.implements.extend(
        asynchronous=True, exchange_type=frozenset(["direct", "topic", "fanout"])
    )

    def __init__(self, client: Any, **options: Any) -> None:
        super().__init__(client, **options)
        self._broker: Broker | None = None
        self._taker: Taker | None = None
        self._loop: Any = None
        self._timers: list[Any] = []
        self._later: Any = None
        self._soon = False
        self._delivering: int | None = None
        #: Bindings that this connection has made, as exchange, routing key and queue.
        self.known: set[tuple[str, str, str]] = set()
        #: Queues that go with this connection's taker, whose id this is.
        self.private: dict[str, int] = {}

    @property
    def broker(self) -> Broker:
        if self._broker is None:
            self._broker = broker_at(self.client.hostname, self.client.transport_options)
        return self._broker

    @property
    def has_taker(self) -> bool:
        return self._taker is not None

    @property
    def taker(self) -> Taker:
        """Who takes over this connection; it begins to be there with the first use."""
        if self._taker is None:
            self._taker = Taker(self.broker)
            self._attach()
        return self._taker

    def driver_version(self) -> str:
        return str(self.broker.engine.dialect.driver)

    def establish_connection(self) -> Any:
        self.broker.make_ready()
        with self.broker.engine.connect():
            return super().establish_connection()

    def close_connection(self, connection: Any) -> None:
        self._detach()
        try:
            super().close_connection(connection)
        finally:
            taker, self._taker = self._taker, None
            if taker is not None:
                taker.end()
            # What is declared again after this belongs to another taker.
            self.known.clear()
            self.private.clear()
            self.state.clear()

    def deliver(self, payload: dict[str, Any], queue: str) -> None:
        """Hand a message to the consumer of *queue*."""
        before, self._delivering = self._delivering, threading.get_ident()
        try:
            self._deliver(payload, queue)
        finally:
            self._delivering = before

    # ── in an event loop ────────────────────────────────────────────────────────────────────

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self._loop = loop
        if self._taker is not None:
            self._attach()

    def _attach(self) -> None:
        if self._loop is None or self._taker is None or self._timers:
            return
        self._loop.add_reader(self._taker.fileno(), self._on_readable)
        self._timers = [self._loop.call_repeatedly(self.broker.dialect.glance, self._glance)]

    def _detach(self) -> None:
        timers, self._timers = self._timers, []
        for timer in (*timers, *filter(None, [self._later])):
            timer.cancel()
        self._later = None
        if timers and self._taker is not None:
            with suppress(Exception):  # it was reset by who lost the connection
                self._loop.remove(self._taker.fileno())
        self._loop = None

    def listen(self) -> None:
        """Learn what can be taken, as far as that has been told."""
        self._wake(self.taker.woken())

    def begin_taking(self) -> None:
        """Take what is in the queues of a new consumer, as soon as it is complete."""
        self.taker  # noqa: B018  # begins to be there
        self._call_soon()

    def settled(self, channel: Any) -> None:
        """Something is done on *channel*; told by any thread."""
        if self._loop is None or self._delivering == threading.get_ident():
            channel.flush()
        elif not self._soon:
            self._call_soon()

    def _call_soon(self) -> None:
        if self._loop is not None and not self._soon:
            self._soon = True
            self._loop.call_soon(self._on_soon)

    def _on_soon(self) -> None:
        self._soon = False
        if self._loop is None or self._taker is None:
            return
        self.listen()
        if any(channel.is_urgent for channel in self.channels):
            self._refill()
        elif any(channel.is_waiting for channel in self.channels):
            self._call_later(COMPANY)

    def _call_later(self, seconds: float) -> None:
        if self._loop is not None and self._later is None:
            self._later = self._loop.call_later(seconds, self._on_later)

    def _on_later(self) -> None:
        self._later = None
        self._refill()

    def _on_readable(self) -> None:
        self.listen()
        with suppress(Busy):
            self._plan()
        self._on_soon()

    def _glance(self) -> None:
        if self._taker is None:
            return
        with suppress(Busy):
            if self._taker.missed() | self._taker.sweep():
                self._wake(None)
            self._plan()
        self._on_soon()

    def _plan(self) -> None:
        """Be there when the next message is due, if that is before the next look."""
        due = self.taker.plan()
        if due is not None and due < self.broker.dialect.glance and self._loop is not None:
            self._loop.call_later(due, self._on_due)

    def _on_due(self) -> None:
        if self._taker is not None and self._loop is not None:
            with suppress(Busy):  # the next look sees to it
                self._wake(self._taker.come_due())
            self._on_soon()

    def _wake(self, queues: Collection[str] | None) -> None:
        for channel in self.channels:
            channel.wake(queues)

    def _refill(self) -> int:
        if self._taker is None or self._delivering is not None:
            return 0
        number, busy = 0, False
        for channel in tuple(self.channels):
            # Without the taker's lock: a pool that is full stops us here until a task is done,
            # which has to be told to the database by another thread.
            try:
                number += channel.refill(self._taker)
            except Busy:
                busy = True
        if self._taker is None:  # closed by what was delivered
            return number
        self.listen()
        if busy:
            self._call_later(REST)
        elif any(channel.is_urgent for channel in self.channels):
            self._call_soon()
        return number

    # ── without one ─────────────────────────────────────────────────────────────────────────

    def drain_events(self, connection: Any, timeout: float | None = None, **_: Any) -> None:
        """Deliver what there is; wait for the first, *timeout* seconds at most.

        Raises:
            socket.timeout: nothing came.
        """
        taker = self.taker
        until = None if timeout is None else monotonic() + timeout
        while True:
            with suppress(Busy):
                if taker.missed() | taker.sweep():
                    self._wake(None)
            self.listen()
            if self._refill():
                return
            left = self.broker.dialect.glance if until is None else until - monotonic()
            if left <= 0:
                raise TimeoutError
            self._wait(taker, min(left, self.broker.dialect.glance))

    def _wait(self, taker: Taker, seconds: float) -> None:
        due = None
        with suppress(Busy):
            due = taker.plan()
        if (told := taker.woken()) is None or told:
            self._wake(told)
            return
        readable, _, _ = select([taker.fileno()], [], [], min(seconds, due or seconds))
        if readable:
            self.listen()
        elif due is not None:
            with suppress(Busy):
                self._wake(taker.come_due())
