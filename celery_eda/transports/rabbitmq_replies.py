"""Replies over RabbitMQ: durable queues that the broker deletes when nobody has used them.

They belong to no connection, so that a reply that comes while its process reconnects is kept. Nor
is one lost that was on its way when the connection broke: it is acknowledged when it has been given
on. RabbitMQ's own direct reply-to cannot be used: who asks has to publish on the channel on which
it waits, and what is committed first is published by another.
"""

from __future__ import annotations

import select
import socket
from contextlib import suppress
from typing import Any

from kombu import Queue

#: Seconds without a word after which a broker is given up, is twice this.
HEARTBEAT = 10
#: Seconds in which the rest of what a broker says follows its beginning.
MOMENT = 0.1


def declare(app: Any, name: str, expires: float) -> None:
    """Make the queue *name*; it goes when it was not used for *expires* seconds."""
    with app.pool.acquire_channel(block=True) as (_, channel):
        _queue(name, expires).bind(channel).declare()


def _queue(name: str, expires: float) -> Queue:
    return Queue(name, expires=expires)


class Replies:
    """The queues of one process, on one connection."""

    def __init__(self, app: Any, *, expires: float) -> None:
        self._expires = expires
        self._broker = app.connection_for_read(heartbeat=HEARTBEAT)
        self._channel: Any = None
        self._arrived: list[Any] = []
        self._given_on: Any = None
        self._alarm, self._bell = socket.socketpair()
        self._bell.setblocking(False)
        self._alarm.setblocking(False)

    def open(self, name: str) -> None:
        self._channel = self._channel or self._broker.channel()
        _queue(name, self._expires).bind(self._channel).declare()
        self._channel.basic_consume(name, callback=self._arrive, consumer_tag=name)

    def close(self, name: str) -> None:
        self._acknowledge()
        self._channel.basic_cancel(name)
        self._channel.queue_delete(name)

    def take(self, timeout: float) -> list[Any]:
        self._acknowledge()
        if not self._arrived and self._anything(timeout):
            self._hear()
        self._broker.heartbeat_check()
        arrived, self._arrived = self._arrived, []
        self._given_on = arrived[-1] if arrived else None
        return arrived

    def wake(self) -> None:
        try:
            self._bell.send(b"!")
        except OSError:
            """It rings already, or nobody is there."""

    def drop(self) -> None:
        self._broker.collect()
        self._alarm.close()
        self._bell.close()

    def _acknowledge(self) -> None:
        """Let the broker forget what the last :meth:`take` has returned."""
        if self._given_on is not None:
            self._given_on.ack(multiple=True)
            self._given_on = None

    def _hear(self) -> None:
        """Read all that the broker says at the moment."""
        with suppress(TimeoutError):  # it was a heartbeat, or the rest is still under way
            while True:
                self._broker.connection.drain_events(timeout=MOMENT)
                if not self._anything(0):
                    break

    def _arrive(self, message: Any) -> None:
        self._arrived.append(self._channel.message_to_python(message))

    def _anything(self, timeout: float) -> bool:
        """Whether the broker says something; waits for it, or for the bell."""
        broker = self._broker.connection.sock
        if getattr(broker, "pending", int)():
            return True
        watch = select.poll()
        watch.register(broker, select.POLLIN)
        watch.register(self._alarm, select.POLLIN)
        ready = dict(watch.poll(timeout * 1000))
        if self._alarm.fileno() in ready:
            self._alarm.recv(4096)
        return broker.fileno() in ready
