"""Messages to queues in a database: one transaction a batch; its commit confirms the messages.

Where that database is the service's own, most messages need no relay: the transaction that
publishes them puts them into their queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy import URL, Connection
from sqlalchemy.exc import SQLAlchemyError

from celery_eda.brokers.base import (
    CONFIRMED,
    PublishResult,
    Sendable,
    refused,
    subscribers,
    unknown,
    unroutable,
)
from celery_eda.brokers.database.broker import DatabaseBroker, kombu_message, queued
from celery_eda.brokers.database.queues import Queued
from celery_eda.brokers.topology import declare
from celery_eda.core import addresses, checkpoints
from celery_eda.core.event import EVENT_EXCHANGE
from celery_eda.core.message import Message
from celery_eda.databases import Tables

OUTAGES = (SQLAlchemyError, OSError, OperationalError)


class Database:
    """One connection to a database which is the broker."""

    def __init__(self, app: Celery, *, timeout: float) -> None:
        self._app = app
        self._timeout = timeout
        self._broker = app.connection_for_write()
        self._channel: Any = None
        self._declared: set[str] = set()

    def publish(self, messages: Sequence[Sendable]) -> list[PublishResult]:
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
        # Without a limit kombu would retry forever.
        self._broker.ensure_connection(max_retries=0, timeout=self._timeout)
        return self._broker.channel()

    def _send(self, messages: Sequence[Sendable]) -> list[PublishResult]:
        channel = self._channel = self._channel or self._connect()
        broker: DatabaseBroker = channel.broker
        routed = [self._routed(channel, each) for each in messages]
        accepted = [each for each in routed if not isinstance(each, PublishResult)]
        broker.put([copy for copies in accepted for copy in copies])
        checkpoints.reach("relay.published")
        return [each if isinstance(each, PublishResult) else CONFIRMED for each in routed]

    def _routed(self, channel: Any, message: Sendable) -> list[Queued] | PublishResult:
        """The copies of *message*, one for each queue that it is routed to; or its refusal."""
        try:
            if message.queue and message.queue not in self._declared:
                declare(self._app, channel, message.queue)
                self._declared.add(message.queue)
            queues = _queues_of(channel, message)
            if not queues:
                if not _is_fanout(channel, message):
                    return refused(unroutable(message))
                return []
            payload = kombu_message(message)
            return [queued(queue, payload) for queue in queues]
        except OUTAGES:
            raise
        except Exception as error:  # this message alone is at fault, not the batch
            self._declared.discard(message.queue or "")
            return refused(error)


def _queues_of(channel: Any, message: Sendable) -> list[str]:
    if not message.exchange:
        name = message.routing_key
        is_gone = addresses.is_volatile(name) and not channel.has_queue(name)
        return [] if is_gone else [name]
    exchange, table = channel.typeof(message.exchange), channel.get_table(message.exchange)
    if message.exchange == EVENT_EXCHANGE:
        return subscribers(table, message.routing_key)
    return sorted(exchange.lookup(table, message.exchange, message.routing_key, None))


def _is_fanout(channel: Any, message: Sendable) -> bool:
    """True if *message* goes to the consumers of the moment, of which there may be none."""
    return bool(message.exchange) and channel.typeof(message.exchange).type == "fanout"


class DirectEnqueue:
    """Puts messages directly into their queues, in the transaction that publishes them."""

    def __init__(self, broker: DatabaseBroker) -> None:
        self._broker = broker

    def put(
        self, connection: Connection, messages: Sequence[Message]
    ) -> tuple[list[str], list[Message]]:
        """Put *messages* into their queues.

        Returns:
            The queue of each message put, and the messages that have to go through the outbox:
            those with prerequisites, and those that an exchange has to route.
        """
        direct = [each for each in messages if _is_direct(each)]
        rows = [queued(each.routing_key, kombu_message(each), each.due) for each in direct]
        self._broker.queues.put(connection, rows)
        return [row.queue for row in rows], [each for each in messages if not _is_direct(each)]

    def wake_all(self) -> None:
        """Wake the takers, after the transaction has committed."""
        self._broker.wake_all()


def _is_direct(message: Message) -> bool:
    queue = message.routing_key
    return not (message.exchange or message.prerequisites or addresses.is_volatile(queue))


def direct_enqueue_of(app: Celery, url: URL, tables: Tables) -> DirectEnqueue | None:
    """The direct way into the queues, for an app whose own database is at *url*.

    None if the broker of *app* is another database, or uses other *tables*.
    """
    broker: DatabaseBroker = app.connection_for_write().transport.broker
    return DirectEnqueue(broker) if broker.is_at(url, tables) else None
