"""Kombu's transport on a database: ``eda+sqlite:///file`` and ``eda+postgresql://…``.

It waits for messages in an event loop or without one. A worker claims more messages when half of
its prefetched ones are acknowledged, or when it is idle.
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

from celery_eda.brokers.database.broker import DatabaseBroker, broker_at
from celery_eda.brokers.database.channel import OUTAGES, RETRY_DELAY, Channel
from celery_eda.brokers.database.taker import Busy, Taker

#: Seconds that an acknowledgement waits for others to share its transaction.
BATCHING_DELAY = 0.01
#: Seconds until the next turn of the event loop, for calls from within a callback. There kombu's
#: ``call_soon`` would call after the next event, be that a second away.
NEXT_TURN = 0.0005


class Transport(virtual.Transport):
    """Connections to a database which is the broker."""

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
        self._broker: DatabaseBroker | None = None
        self._taker: Taker | None = None
        self._loop: Any = None
        self._loop_thread: int | None = None
        self._timers: list[Any] = []
        self._later: Any = None
        self._soon = False
        self._delivering: int | None = None
        #: Bindings that this connection has made, as exchange, routing key and queue.
        self.known: set[tuple[str, str, str]] = set()
        #: Queues that are deleted with this connection's taker, and the taker's id.
        self.private: dict[str, int] = {}

    @property
    def broker(self) -> DatabaseBroker:
        if self._broker is None:
            self._broker = broker_at(self.client.hostname, self.client.transport_options)
        return self._broker

    @property
    def has_taker(self) -> bool:
        return self._taker is not None

    def ensure_taker(self) -> Taker:
        """The taker of this connection; the first call makes it, and announces its presence."""
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
            # Queues declared after this belong to another taker.
            self.known.clear()
            self.private.clear()
            self.state.clear()

    def deliver(self, payload: dict[str, Any], queue: str) -> None:
        """Deliver a message to the consumer of *queue*."""
        before, self._delivering = self._delivering, threading.get_ident()
        try:
            self._deliver(payload, queue)
        finally:
            self._delivering = before

    # ── in an event loop ────────────────────────────────────────────────────────────────────

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self._loop, self._loop_thread = loop, threading.get_ident()
        if self._taker is not None:
            self._attach()
            self._call_soon()

    def _attach(self) -> None:
        if self._loop is None or self._taker is None or self._timers:
            return
        self._loop.add_reader(self._taker.fileno(), self._on_readable)
        self._timers = [self._loop.call_repeatedly(self.broker.queueing.poll_interval, self._poll)]

    def _detach(self) -> None:
        timers, self._timers = self._timers, []
        for timer in (*timers, *filter(None, [self._later])):
            timer.cancel()
        self._later = None
        if timers and self._taker is not None:
            with suppress(Exception):  # the loop was reset when the connection was lost
                self._loop.remove(self._taker.fileno())
        self._loop = None

    def receive_wakeups(self) -> None:
        """Mark the queues that this connection has been woken for."""
        self._wake(self.ensure_taker().woken())

    def begin_consuming(self) -> None:
        """Claim messages for a new consumer, as soon as its registration is complete."""
        self.ensure_taker()
        self._call_soon()

    def settled(self, channel: Any) -> None:
        """Write results of *channel* soon, or at once in the thread that delivers. Thread-safe."""
        if self._loop is None or self._delivering == threading.get_ident():
            channel.flush()
        elif not self._soon:
            self._call_soon()

    def _call_soon(self) -> None:
        if self._loop is None or self._soon:
            return
        self._soon = True
        if self._loop_thread == threading.get_ident():
            self._loop.call_later(NEXT_TURN, self._on_soon)
        else:
            self._loop.call_soon(self._on_soon)

    def _on_soon(self) -> None:
        self._soon = False
        if self._loop is None or self._taker is None:
            return
        self.receive_wakeups()
        if any(channel.is_urgent for channel in self.channels):
            self._refill()
        elif any(channel.has_work for channel in self.channels):
            self._call_later(BATCHING_DELAY)

    def _call_later(self, seconds: float) -> None:
        if self._loop is not None and self._later is None:
            self._later = self._loop.call_later(seconds, self._on_later)

    def _on_later(self) -> None:
        self._later = None
        self._refill()

    def _on_readable(self) -> None:
        self.receive_wakeups()
        with suppress(Busy):
            self._plan()
        self._on_soon()

    def _poll(self) -> None:
        if self._taker is None:
            return
        with suppress(Busy):
            if self._taker.missed() | self._taker.sweep():
                self._wake(None)
            self._plan()
        self._on_soon()

    def _plan(self) -> None:
        """Schedule a call for when the next message is due, if that is before the next poll."""
        due = self.ensure_taker().plan()
        if due is not None and due < self.broker.queueing.poll_interval and self._loop is not None:
            self._loop.call_later(due, self._on_due)

    def _on_due(self) -> None:
        if self._taker is not None and self._loop is not None:
            with suppress(Busy):  # the next poll does it
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
            # Without the taker's lock: a full pool blocks this call until a task ends, and another
            # thread has to write that result to the database.
            try:
                number += channel.refill(self._taker)
            except Busy:
                busy = True
        if self._taker is None:  # a delivered task closed the connection
            return number
        self.receive_wakeups()
        if busy:
            self._call_later(RETRY_DELAY)
        elif number or any(channel.is_urgent for channel in self.channels):
            # With the pool solo, Celery runs what was delivered in the next turn of the loop.
            self._call_soon()
        return number

    # ── without one ─────────────────────────────────────────────────────────────────────────

    def drain_events(self, connection: Any, timeout: float | None = None, **_: Any) -> None:
        """Deliver the messages there are; wait for the first for *timeout* seconds at most.

        Raises:
            socket.timeout: no message has come.
        """
        taker = self.ensure_taker()
        until = None if timeout is None else monotonic() + timeout
        while True:
            with suppress(Busy):
                if taker.missed() | taker.sweep():
                    self._wake(None)
            self.receive_wakeups()
            if self._refill():
                return
            left = self.broker.queueing.poll_interval if until is None else until - monotonic()
            if left <= 0:
                raise TimeoutError
            self._wait(taker, min(left, self.broker.queueing.poll_interval))

    def _wait(self, taker: Taker, seconds: float) -> None:
        due = None
        with suppress(Busy):
            due = taker.plan()
        if (woken_for := taker.woken()) is None or woken_for:
            self._wake(woken_for)
            return
        readable, _, _ = select([taker.fileno()], [], [], min(seconds, due or seconds))
        if readable:
            self.receive_wakeups()
        elif due is not None:
            with suppress(Busy):
                self._wake(taker.come_due())
