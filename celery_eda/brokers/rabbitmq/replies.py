"""Replies over RabbitMQ: durable queues that the broker deletes when they have not been used.

The queues belong to no connection, so that the broker stores a reply while its process reconnects.
A reply that was in flight when the connection broke is redelivered: it is acknowledged only after
it has been passed on. RabbitMQ's direct reply-to cannot be used, because it requires a request to
be published on the channel that waits for the reply, and a relay publishes on a channel of its own.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from celery import Celery
from kombu import Queue

from celery_eda.brokers.bell import Bell
from celery_eda.brokers.readiness import readable

#: Seconds between two heartbeats; without any for twice as long the broker counts as lost.
HEARTBEAT = 10
#: Replies that the broker sends before the ones received are acknowledged.
PREFETCH = 500
#: Seconds to wait for the rest of a frame that has begun to arrive.
MOMENT = 0.1


def declare(app: Celery, name: str, expires: float) -> None:
    """Declare the queue *name*; the broker deletes it after *expires* seconds without use."""
    with app.pool.acquire_channel(block=True) as (_, channel):
        _queue(name, expires).bind(channel).declare()


def _queue(name: str, expires: float) -> Queue:
    return Queue(name, expires=expires)


class ReplyConsumer:
    """The reply queues of one process, over one connection. See ``brokers.base``."""

    def __init__(self, app: Celery, *, expires: float) -> None:
        self._expires = expires
        self._broker = app.connection_for_read(heartbeat=HEARTBEAT)
        self._channel: Any = None
        self._arrived: list[Any] = []
        self._returned: Any = None
        self._bell = Bell()

    def open(self, name: str) -> None:
        if self._channel is None:
            self._channel = self._broker.channel()
            self._channel.basic_qos(0, PREFETCH, False)
        _queue(name, self._expires).bind(self._channel).declare()
        self._channel.basic_consume(name, callback=self._on_message, consumer_tag=name)

    def close(self, name: str) -> None:
        self._acknowledge()
        self._channel.basic_cancel(name)
        self._channel.queue_delete(name)

    def take(self, timeout: float) -> list[Any]:
        self._acknowledge()
        if not self._arrived and self._is_readable(timeout):
            self._receive()
        self._broker.heartbeat_check()
        arrived, self._arrived = self._arrived, []
        self._returned = arrived[-1] if arrived else None
        return arrived

    def wake(self) -> None:
        self._bell.ring()

    def drop(self) -> None:
        self._broker.collect()
        self._bell.close()

    def _acknowledge(self) -> None:
        """Acknowledge what the last :meth:`take` has returned."""
        if self._returned is not None:
            self._returned.ack(multiple=True)
            self._returned = None

    def _receive(self) -> None:
        """Read all that has arrived from the broker."""
        with suppress(TimeoutError):  # a heartbeat, or the rest of a frame is late
            while True:
                self._broker.connection.drain_events(timeout=MOMENT)
                if not self._is_readable(0):
                    break

    def _on_message(self, message: Any) -> None:
        self._arrived.append(self._channel.message_to_python(message))

    def _is_readable(self, timeout: float) -> bool:
        """True if the broker has sent something; waits for that, or for the bell."""
        broker = self._broker.connection.sock
        if getattr(broker, "pending", int)():
            return True
        ready = readable(broker, self._bell, within=timeout)
        if self._bell.fileno() in ready:
            self._bell.reset()
        return broker.fileno() in ready
