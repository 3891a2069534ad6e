"""Kombu's transport on a database: ``eda+sqlite:///file`` and ``eda+postgresql://…``.

Acknowledgements and the next messages share a transaction, since a commit is what costs. A worker
takes more when it has worked off half of what it may hold, or has nothing else to do.
"""

from __future__ import annotations

import threading
from base64 import b64encode
from collections import OrderedDict, deque
from contextlib import suppress
from select import select
from time import monotonic, sleep
from typing import Any

from kombu.exceptions import ChannelError, OperationalError
from kombu.transport import base, virtual
from kombu.utils.json import loads
from sqlalchemy import exc

from celery_eda.queues import BY_NAME, Lease
from celery_eda.transports.base import UNREADABLE
from celery_eda.transports.database_broker import Broker, broker_at, waiting
from celery_eda.transports.database_taker import Busy, Taker

#: Seconds that an acknowledgement waits for company.
COMPANY = 0.01
#: Seconds until it is tried again to change what others have locked.
REST = 0.1
#: Messages taken at once where nothing else limits it.
AT_ONCE = 100

OUTAGES = (
    *(OSError, OperationalError, base.ConnectionError),
    *(exc.OperationalError, exc.InterfaceError, exc.InternalError, exc.TimeoutError),
)


class QoS:
    """What a channel holds, and what is to be told to the database of it.

    May be told by any thread.
    """

    def __init__(self, channel: Channel, prefetch_count: int = 0) -> None:
        self.channel = channel
        self.prefetch_count = prefetch_count
        self._delivered: OrderedDict[str, Any] = OrderedDict()
        self.done: deque[Lease] = deque()
        self.returned: deque[Lease] = deque()

    def can_consume(self) -> bool:
        return self.room > 0

    def can_consume_max_estimate(self) -> int:
        return self.room

    @property
    def room(self) -> int:
        """How many more messages it may hold."""
        if not self.prefetch_count:
            return AT_ONCE
        return max(0, self.prefetch_count - len(self._delivered))

    @property
    def is_low(self) -> bool:
        """Whether half of what it may hold is worked off."""
        return not self.prefetch_count or len(self._delivered) <= self.prefetch_count // 2

    def append(self, message: Any, delivery_tag: str) -> None:
        self._delivered[delivery_tag] = message

    def get(self, delivery_tag: str) -> Any:
        return self._delivered[delivery_tag]

    def ack(self, delivery_tag: str) -> None:
        self._settle(delivery_tag, self.done)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self._settle(delivery_tag, self.returned if requeue else self.done)

    def _settle(self, tag: str, where: deque[Lease]) -> None:
        lease = Lease.of(tag)
        self._delivered.pop(tag, None)
        if self.channel.closed:
            if where is self.done:
                self.channel.broker.late.append(lease)
            return
        where.append(lease)
        self.channel.settled()

    def restore_unacked(self) -> None:
        """Let others have what is not acknowledged."""
        self.returned.extend(map(Lease.of, self._delivered))
        self._delivered.clear()

    def restore_unacked_once(self, stderr: Any = None) -> None:
        self.restore_unacked()

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: what a dead worker held comes back by itself."""


class Channel(virtual.Channel):
    """Puts messages into queues, and takes them out."""

    QoS = QoS
    body_encoding = None
    supports_fanout = True

    def __init__(self, connection: Any, **options: Any) -> None:
        super().__init__(connection, **options)
        self.broker: Broker = connection.broker
        self._inbox: deque[tuple[Any, bool]] = deque()
        self._hungry: dict[str, None] = {}
        self._without_ack: set[str] = set()

    # ── putting ─────────────────────────────────────────────────────────────────────────────

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> None:
        self.broker.put([waiting(queue, message)])

    def _put_fanout(
        self, exchange: str, message: dict[str, Any], routing_key: str, **_: Any
    ) -> None:
        queues = {queue for _, _, queue in self.get_table(exchange)}
        if queues:
            self.broker.put([waiting(queue, message) for queue in sorted(queues)])

    # ── queues and bindings ─────────────────────────────────────────────────────────────────

    def _new_queue(
        self, queue: str, auto_delete: bool = False, exclusive: bool = False, **_: Any
    ) -> None:
        known = self.connection.known
        if (BY_NAME, queue, queue) in known:
            return
        owner = self.connection.taker.id if auto_delete or exclusive else None
        if owner is not None:
            self.connection.private[queue] = owner
        with self.broker.engine.begin() as connection:
            if owner is not None or not self.broker.queues.exists(connection, queue):
                self.broker.queues.bind(connection, queue, BY_NAME, queue, owner)
        known.add((BY_NAME, queue, queue))

    def _has_queue(self, queue: str, **_: Any) -> bool:
        with self.broker.engine.connect() as connection:
            return self.broker.queues.exists(connection, queue)

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        if (exchange, routing_key, queue) in self.connection.known:
            return
        owner = self.connection.private.get(queue)
        with self.broker.engine.begin() as connection:
            self.broker.queues.bind(connection, queue, exchange, routing_key, owner)
        self.connection.known.add((exchange, routing_key, queue))

    def queue_unbind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Any = None,
        **_: Any,
    ) -> None:
        self.state.binding_delete(queue, exchange, routing_key)
        self.connection.known.discard((exchange, routing_key, queue))
        with self.broker.engine.begin() as connection:
            self.broker.queues.unbind(connection, queue, exchange or "", routing_key)

    def get_table(self, exchange: str) -> list[Any]:
        with self.broker.engine.connect() as connection:
            bindings = self.broker.queues.bindings(connection, exchange)
        kind = self.typeof(exchange)
        return [
            kind.prepare_bind(each.queue, exchange, each.routing_key, None) for each in bindings
        ]

    def queue_delete(
        self, queue: str, if_unused: bool = False, if_empty: bool = False, **_: Any
    ) -> None:
        with self.broker.engine.begin() as connection:
            if if_empty and self.broker.queues.size(connection, queue):
                return
            self.broker.queues.drop(connection, [queue])
        self.state.queue_bindings_delete(queue)
        self.connection.known = {each for each in self.connection.known if each[2] != queue}
        self.connection.private.pop(queue, None)

    def _size(self, queue: str) -> int:
        with self.broker.engine.connect() as connection:
            return self.broker.queues.size(connection, queue)

    def _purge(self, queue: str) -> int:
        with self.broker.engine.begin() as connection:
            return self.broker.queues.purge(connection, queue)

    # ── taking ──────────────────────────────────────────────────────────────────────────────

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> None:
        (self._without_ack.add if no_ack else self._without_ack.discard)(queue)
        self._hungry[queue] = None
        super().basic_consume(queue, no_ack, *args, **kwargs)
        if queue in self.connection.private:
            self._own(queue)
        self.connection.begin_taking()

    def _own(self, queue: str) -> None:
        """Let a private queue end with us, who take from it, and not with who declared it first."""
        owner = self.connection.taker.id
        bindings = [each for each in self.connection.known if each[2] == queue]
        with self.broker.engine.begin() as connection:
            for exchange, key, _ in bindings:
                self.broker.queues.bind(connection, queue, exchange, key, owner, takes_over=True)

    def basic_cancel(self, consumer_tag: str) -> None:
        self._hungry.pop(self._tag_to_queue.get(consumer_tag, ""), None)
        super().basic_cancel(consumer_tag)

    def basic_get(self, queue: str, no_ack: bool = False, **_: Any) -> Any:
        taker = self.connection.taker
        with suppress(Busy):
            taker.sweep()
        while True:
            try:
                with taker.transaction() as connection:
                    rows = (
                        taker.queues.take(connection, queue, 1)
                        if no_ack
                        else taker.queues.lease(connection, queue, taker.id, 1)
                    )
                break
            except Busy:
                sleep(REST)
        if not rows:
            return None
        message = self.Message(payload_of(rows[0]), channel=self)
        if not no_ack:
            self.qos.append(message, message.delivery_tag)
        return message

    def is_consuming(self, queue: str) -> bool:
        return queue in self._active_queues

    def wake(self, queues: frozenset[str] | set[str] | None) -> None:
        """Look into these *queues* the next time; None for all."""
        for queue in self._active_queues:
            if queues is None or queue in queues:
                self._hungry.setdefault(queue, None)

    @property
    def is_waiting(self) -> bool:
        """Whether something is left to be told to the database, or to be taken from it."""
        qos = self.qos
        return bool(qos.done or qos.returned or self._inbox or (self._hungry and qos.room))

    @property
    def is_urgent(self) -> bool:
        """Whether that should not wait for company."""
        return bool(self._inbox or self.qos.returned or (self._hungry and self.qos.is_low))

    def refill(self, taker: Taker) -> int:
        """Tell what is done, take what there is room for; returns how many were delivered.

        Raises:
            Busy: neither could be done now.
        """
        if self.is_waiting:
            self._exchange(taker)
        return self._deliver_inbox()

    def flush(self) -> None:
        """Tell the database what is done."""
        if self.qos.done or self.qos.returned:
            with suppress(Busy):  # with the next messages, then
                self._exchange(self.connection.taker, take=False)

    def _exchange(self, taker: Taker, *, take: bool = True) -> None:
        qos = self.qos
        done, returned = _drained(qos.done), _drained(qos.returned)
        try:
            with taker.transaction() as connection:
                taker.queues.complete(connection, done)
                taker.queues.give_back(connection, returned)
                rows = self._taken(taker, connection) if take else []
        except BaseException:
            qos.done.extend(done)
            qos.returned.extend(returned)
            raise
        self._inbox.extend(rows)
        if returned:
            # Somebody else may be waiting for them, or we.
            self.wake(None)
            self.broker.ring()

    def _taken(self, taker: Taker, connection: Any) -> list[tuple[Any, bool]]:
        taken: list[tuple[Any, bool]] = []
        room = self.qos.room - len(self._inbox)
        for queue in list(self._hungry):
            no_ack = queue in self._without_ack
            limit = AT_ONCE if no_ack else min(room, AT_ONCE)
            if limit <= 0:
                continue
            rows = (
                taker.queues.take(connection, queue, limit)
                if no_ack
                else taker.queues.lease(connection, queue, taker.id, limit)
            )
            room -= 0 if no_ack else len(rows)
            taken += [(row, no_ack) for row in rows]
            del self._hungry[queue]
            if len(rows) == limit:  # there may be more; after those of the other queues
                self._hungry[queue] = None
        return taken

    def _deliver_inbox(self) -> int:
        number = 0
        while self._inbox:
            # A pool without processes runs the task right here, however long that takes.
            self.flush()
            row, no_ack = self._inbox.popleft()
            if self.is_consuming(row.queue):
                self.connection.deliver(payload_of(row), row.queue)
                number += 1
            elif not no_ack:
                self.qos.returned.append(Lease(row.id, row.fence))
        return number

    def settled(self) -> None:
        """Something is done: tell the database soon, or at once if we are in the way of that."""
        if (transport := self.connection) is not None:
            transport.settled(self)

    def close(self) -> None:
        if self.closed:
            return
        transport = self.connection
        for row, no_ack in _drained(self._inbox):
            if not no_ack:
                self.qos.returned.append(Lease(row.id, row.fence))
        self.qos.restore_unacked()
        if transport is not None and transport.has_taker:
            try:
                self._exchange(transport.taker, take=False)
            except (Busy, *OUTAGES):
                self.broker.late.extend(self.qos.done)
        super().close()


def _drained(pending: deque[Any]) -> list[Any]:
    """What is *pending*, each for one thread alone."""
    drained = []
    with suppress(IndexError):
        while True:
            drained.append(pending.popleft())
    return drained


def payload_of(row: Any) -> dict[str, Any]:
    """What kombu makes a message of; one that cannot be read says so in a header."""
    tag = Lease(row.id, row.fence).tag
    try:
        payload: dict[str, Any] = loads(row.message)
        properties = payload["properties"]
        payload["headers"].items()
        properties["delivery_info"].update(redelivered=row.fence > 1)
    except Exception as error:
        octets = b64encode(row.message.encode(errors="replace")).decode()
        unreadable = [f"{type(error).__name__} in the envelope", octets]
        properties = {"delivery_info": {"exchange": "", "routing_key": row.queue}}
        payload = {"headers": {UNREADABLE: unreadable}, "properties": properties}
    properties["delivery_tag"] = tag
    payload["body"] = bytes(row.body)
    return payload


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
        self._wake(self._taker.presence.heard())
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
        self._wake(self.taker.presence.woken())
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

    def _wake(self, queues: frozenset[str] | set[str] | None) -> None:
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
        self._wake(self._taker.presence.heard())
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
            self._wake(taker.presence.heard())
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
        if heard := taker.presence.heard():
            self._wake(heard)
            return
        readable, _, _ = select([taker.fileno()], [], [], min(seconds, due or seconds))
        if readable:
            self._wake(taker.presence.woken())
        elif due is not None:
            with suppress(Busy):
                self._wake(taker.come_due())
