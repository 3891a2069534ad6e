"""Messages to queues in a database: one transaction for a batch; confirmed is what is committed.

Where that database is the service's own, most need no relay: they are put into their queue by the
transaction that publishes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kombu.exceptions import OperationalError
from sqlalchemy import URL, Connection
from sqlalchemy.exc import SQLAlchemyError

from celery_eda import addresses, checkpoints
from celery_eda.event import EVENT_EXCHANGE
from celery_eda.message import Message
from celery_eda.queues import Waiting
from celery_eda.tables import Tables
from celery_eda.transports.base import (
    CONFIRMED,
    Answer,
    Sendable,
    declare,
    refused,
    subscribers,
    unknown,
    unroutable,
)
from celery_eda.transports.database_broker import Broker, prepared_for, waiting

OUTAGES = (SQLAlchemyError, OSError, OperationalError)


class Database:
    """One connection to a database that is the broker."""

    def __init__(self, app: Any, *, timeout: float) -> None:
        self._app = app
        self._timeout = timeout
        self._broker = app.connection_for_write()
        self._channel: Any = None
        self._declared: set[str] = set()

    def publish(self, messages: Sequence[Sendable]) -> list[Answer]:
        if not messages:
            return []
        try:
            return self._send(messages)
        except OUTAGES as error:
            self.close()
            return [unknown(error)] * len(messages)

    def close(self) -> None:
        self._broker.collect()
        self._channel = None
        self._declared = set()

    def _connect(self) -> Any:
        # By default kombu would try for ever.
        self._broker.ensure_connection(max_retries=0, timeout=self._timeout)
        return self._broker.channel()

    def _send(self, messages: Sequence[Sendable]) -> list[Answer]:
        channel = self._channel = self._channel or self._connect()
        broker: Broker = channel.broker
        routed = [self._routed(channel, each) for each in messages]
        placed = [each for each in routed if not isinstance(each, Answer)]
        broker.put([one for each in placed for one in each])
        checkpoints.reach("relay.published")
        return [each if isinstance(each, Answer) else CONFIRMED for each in routed]

    def _routed(self, channel: Any, message: Sendable) -> list[Waiting] | Answer:
        """*message* as it will wait in each queue that it goes to."""
        try:
            if message.queue and message.queue not in self._declared:
                declare(self._app, channel, message.queue)
                self._declared.add(message.queue)
            queues = _queues_of(channel, message)
            if not queues:
                if not _is_heard_by_chance(channel, message):
                    return refused(unroutable(message))
                return []
            prepared = prepared_for(message)
            return [waiting(queue, prepared) for queue in queues]
        except OUTAGES:
            raise
        except Exception as error:  # whatever is wrong with it, it is wrong with it alone
            self._declared.discard(message.queue or "")
            return refused(error)


def _queues_of(channel: Any, message: Sendable) -> list[str]:
    if not message.exchange:
        name = message.routing_key
        gone = addresses.is_volatile(name) and not channel._has_queue(name)
        return [] if gone else [name]
    exchange, table = channel.typeof(message.exchange), channel.get_table(message.exchange)
    if message.exchange == EVENT_EXCHANGE:
        return subscribers(table, message.routing_key)
    return sorted(exchange.lookup(table, message.exchange, message.routing_key, None))


def _is_heard_by_chance(channel: Any, message: Sendable) -> bool:
    """Whether it goes to whoever happens to listen, so that it may be nobody."""
    return bool(message.exchange) and channel.typeof(message.exchange).type == "fanout"


class Shortcut:
    """Puts messages straight into their queues, in the transaction that publishes them."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def put(
        self, connection: Connection, messages: Sequence[Message]
    ) -> tuple[list[str], list[Message]]:
        """Put *messages* into their queues.

        Returns:
            The queues that got one, and the messages that have to go through the outbox: they
            have to be preceded by something, or to find their queues by way of an exchange.
        """
        queued = [
            waiting(each.routing_key, prepared_for(each)) for each in messages if _is_plain(each)
        ]
        self._broker.queues.put(connection, queued)
        return [each.queue for each in queued], [each for each in messages if not _is_plain(each)]

    def ring(self) -> None:
        """Wake who waits for what has just been committed."""
        self._broker.ring()


def _is_plain(message: Message) -> bool:
    queue = message.routing_key
    return not (message.exchange or message.preparation or addresses.is_volatile(queue))


def shortcut_of(app: Any, url: URL, tables: Tables) -> Shortcut | None:
    """What puts messages of *app* into queues in the database at *url*.

    None if the broker of *app* is another database, or has other *tables*.
    """
    broker: Broker = app.connection_for_write().transport.broker
    return Shortcut(broker) if broker.is_at(url, tables) else None
