"""Kombu's channel on a database which is the broker.

Acknowledgements and the next leases share a transaction, since the commit is what costs.
"""

from __future__ import annotations

from base64 import b64encode
from collections import OrderedDict, deque
from collections.abc import Collection
from contextlib import suppress
from time import sleep
from typing import Any

from kombu.exceptions import OperationalError
from kombu.transport import base, virtual
from kombu.utils.json import loads
from sqlalchemy import exc

from celery_eda.brokers.database.broker import DatabaseBroker, queued, was_kept
from celery_eda.brokers.database.queues import BY_NAME, Lease
from celery_eda.brokers.database.taker import Busy, Taker
from celery_eda.core.identity import WAITED
from celery_eda.core.message import UNREADABLE

#: Seconds until the next attempt after another transaction had locked the rows.
RETRY_DELAY = 0.1
#: Messages claimed at once where no prefetch count limits them.
BATCH = 100

OUTAGES = (
    OSError,
    OperationalError,
    base.ConnectionError,
    exc.OperationalError,
    exc.InterfaceError,
    exc.InternalError,
    exc.TimeoutError,
)


class QoS:
    """The unacknowledged messages of a channel, and the results not written to the database yet.

    Any thread may acknowledge or reject.

    Attributes:
        done: leases to complete.
        returned: leases to requeue.
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
        """The number of messages that may be delivered before the next acknowledgement."""
        if not self.prefetch_count:
            return BATCH
        return max(0, self.prefetch_count - len(self._delivered))

    @property
    def is_low(self) -> bool:
        """True if half of the prefetched messages have been acknowledged."""
        return not self.prefetch_count or len(self._delivered) <= self.prefetch_count // 2

    def append(self, message: Any, delivery_tag: str) -> None:
        self._delivered[delivery_tag] = message

    def get(self, delivery_tag: str) -> Any:
        return self._delivered[delivery_tag]

    def ack(self, delivery_tag: str) -> None:
        self._settle(delivery_tag, self.done)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self._settle(delivery_tag, self.returned if requeue else self.done)

    def _settle(self, tag: str, results: deque[Lease]) -> None:
        lease = Lease.of(tag)
        self._delivered.pop(tag, None)
        if self.channel.closed:
            if results is self.done:
                self.channel.broker.late.append(lease)
            return
        results.append(lease)
        self.channel.settled()

    def restore_unacked(self) -> None:
        """Requeue the messages that are not acknowledged."""
        self.returned.extend(map(Lease.of, self._delivered))
        self._delivered.clear()

    def restore_unacked_once(self, stderr: Any = None) -> None:
        self.restore_unacked()

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: takers reclaim the messages of a dead worker."""


class Channel(virtual.Channel):
    """Puts messages into queues and delivers those that it leases."""

    QoS = QoS
    body_encoding = None
    supports_fanout = True

    def __init__(self, connection: Any, **options: Any) -> None:
        super().__init__(connection, **options)
        self.broker: DatabaseBroker = connection.broker
        self._inbox: deque[tuple[Any, bool]] = deque()
        self._to_claim: dict[str, None] = {}
        self._without_ack: set[str] = set()

    # ── publishing ──────────────────────────────────────────────────────────────────────────

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> None:
        self.broker.put([queued(queue, message)])

    def _put_fanout(
        self, exchange: str, message: dict[str, Any], routing_key: str, **_: Any
    ) -> None:
        queues = {queue for _, _, queue in self.get_table(exchange)}
        if queues:
            self.broker.put([queued(queue, message) for queue in sorted(queues)])

    # ── queues and bindings ─────────────────────────────────────────────────────────────────

    def _new_queue(
        self, queue: str, auto_delete: bool = False, exclusive: bool = False, **_: Any
    ) -> None:
        known = self.connection.known
        if (BY_NAME, queue, queue) in known:
            return
        owner = self.connection.ensure_taker().id if auto_delete or exclusive else None
        if owner is not None:
            self.connection.private[queue] = owner
        with self.broker.engine.begin() as connection:
            if owner is not None or not self.broker.queues.exists(connection, queue):
                self.broker.queues.bind(connection, queue, BY_NAME, queue, owner)
        known.add((BY_NAME, queue, queue))

    def has_queue(self, queue: str) -> bool:
        """True if *queue* is declared."""
        with self.broker.engine.connect() as connection:
            return self.broker.queues.exists(connection, queue)

    def _has_queue(self, queue: str, **_: Any) -> bool:
        return self.has_queue(queue)

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

    # ── consuming ───────────────────────────────────────────────────────────────────────────

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> None:
        (self._without_ack.add if no_ack else self._without_ack.discard)(queue)
        self._to_claim[queue] = None
        super().basic_consume(queue, no_ack, *args, **kwargs)
        if queue in self.connection.private:
            self._own(queue)
        self.connection.begin_consuming()

    def _own(self, queue: str) -> None:
        """Make this taker, which consumes a private queue, its owner instead of the declarer."""
        owner = self.connection.ensure_taker().id
        bindings = [each for each in self.connection.known if each[2] == queue]
        with self.broker.engine.begin() as connection:
            for exchange, key, _ in bindings:
                self.broker.queues.bind(connection, queue, exchange, key, owner, takes_over=True)

    def basic_cancel(self, consumer_tag: str) -> None:
        self._to_claim.pop(self._tag_to_queue.get(consumer_tag, ""), None)
        super().basic_cancel(consumer_tag)

    def basic_get(self, queue: str, no_ack: bool = False, **_: Any) -> Any:
        taker = self.connection.ensure_taker()
        with suppress(Busy):
            taker.sweep()
        while True:
            try:
                with taker.transaction() as connection:
                    rows = (
                        taker.take(connection, queue, 1)
                        if no_ack
                        else taker.lease(connection, queue, 1)
                    )
                break
            except Busy:
                sleep(RETRY_DELAY)
        if not rows:
            return None
        message = self.Message(payload_of(rows[0]), channel=self)
        if not no_ack:
            self.qos.append(message, message.delivery_tag)
        return message

    def is_consuming(self, queue: str) -> bool:
        return queue in self._active_queues

    def wake(self, queues: Collection[str] | None) -> None:
        """Claim from these *queues* the next time; None for all."""
        for queue in self._active_queues:
            if queues is None or queue in queues:
                self._to_claim.setdefault(queue, None)

    @property
    def has_work(self) -> bool:
        """True if there are results to write, messages to deliver, or queues to claim from."""
        qos = self.qos
        return bool(qos.done or qos.returned or self._inbox or (self._to_claim and qos.room))

    @property
    def is_urgent(self) -> bool:
        """True if acknowledgements should be written now instead of with the next batch."""
        return bool(self._inbox or self.qos.returned or (self._to_claim and self.qos.is_low))

    def refill(self, taker: Taker) -> int:
        """Write the results, claim messages up to the prefetch count, and deliver them.

        Returns:
            The number of messages delivered.

        Raises:
            Busy: another transaction had locked the rows; nothing has been written or claimed.
        """
        if self.has_work:
            self._synchronize(taker)
        return self._deliver_inbox()

    def flush(self) -> None:
        """Write the results to the database."""
        if self.qos.done or self.qos.returned:
            with suppress(Busy):  # the next claim writes them
                self._synchronize(self.connection.ensure_taker(), claim=False)

    def _synchronize(self, taker: Taker, *, claim: bool = True) -> None:
        qos = self.qos
        done, returned = _drained(qos.done), _drained(qos.returned)
        try:
            with taker.transaction() as connection:
                taker.queues.complete(connection, done)
                taker.queues.requeue(connection, returned)
                rows = self._claimed(taker, connection) if claim else []
        except BaseException:
            qos.done.extend(done)
            qos.returned.extend(returned)
            raise
        self._inbox.extend(rows)
        if returned:
            # Other takers may be waiting for them, or this one.
            self.wake(None)
            self.broker.wake_all()

    def _claimed(self, taker: Taker, connection: Any) -> list[tuple[Any, bool]]:
        claimed: list[tuple[Any, bool]] = []
        room = self.qos.room - len(self._inbox)
        for queue in list(self._to_claim):
            no_ack = queue in self._without_ack
            limit = BATCH if no_ack else min(room, BATCH)
            if limit <= 0:
                continue
            rows = (
                taker.take(connection, queue, limit)
                if no_ack
                else taker.lease(connection, queue, limit)
            )
            room -= 0 if no_ack else len(rows)
            claimed += [(row, no_ack) for row in rows]
            del self._to_claim[queue]
            if len(rows) == limit:  # there may be more: claim again, after the other queues
                self._to_claim[queue] = None
        return claimed

    def _deliver_inbox(self) -> int:
        number = 0
        while self._inbox:
            # A pool without processes runs the task inside deliver(), however long it takes.
            self.flush()
            row, no_ack = self._inbox.popleft()
            if self.is_consuming(row.queue):
                self.connection.deliver(payload_of(row), row.queue)
                number += 1
            elif not no_ack:
                self.qos.returned.append(Lease(row.id, row.fence))
        return number

    def settled(self) -> None:
        """Write new results soon, or at once if this thread keeps the event loop from it."""
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
                self._synchronize(transport.ensure_taker(), claim=False)
            except (Busy, *OUTAGES):
                self.broker.late.extend(self.qos.done)
        super().close()


def _drained(pending: deque[Any]) -> list[Any]:
    """All *pending* items; no two threads get the same one."""
    drained = []
    with suppress(IndexError):
        while True:
            drained.append(pending.popleft())
    return drained


def payload_of(row: Any) -> dict[str, Any]:
    """The payload from which kombu makes a message.

    The payload of an unreadable message has the header ``UNREADABLE`` in place of its own.
    """
    tag = Lease(row.id, row.fence).tag
    try:
        payload: dict[str, Any] = loads(row.message)
        properties = payload["properties"]
        payload["headers"].items()
        waited = {WAITED: True} if was_kept(payload) else {}
        properties["delivery_info"].update(redelivered=row.fence > 1, **waited)
    except Exception as error:
        octets = b64encode(row.message.encode(errors="replace")).decode()
        unreadable = [f"{type(error).__name__} in the envelope", octets]
        properties = {"delivery_info": {"exchange": "", "routing_key": row.queue}}
        payload = {"headers": {UNREADABLE: unreadable}, "properties": properties}
    properties["delivery_tag"] = tag
    payload["body"] = bytes(row.body)
    return payload
