"""Messages to any other broker that kombu knows, one at a time.

``confirmed`` means that kombu's publish has returned. The broker and kombu's transport for it
decide how much that guarantees, and how long a single publish may take.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from kombu.messaging import Producer
from kombu.transport import virtual

from celery_eda.brokers.base import (
    CONFIRMED,
    PublishResult,
    Sendable,
    publish_with,
    refused,
    subscribers,
    unknown,
    unroutable,
)
from celery_eda.brokers.topology import declare
from celery_eda.core.event import EVENT_EXCHANGE


class GenericTransport:
    """One connection to a broker, through kombu."""

    def __init__(self, app: Celery, *, timeout: float) -> None:
        self._app = app
        self._timeout = timeout
        self._broker = app.connection_for_write()
        self._outages = (*self._broker.connection_errors, OperationalError, TimeoutError)
        self._producer: Producer | None = None
        self._declared: set[str] = set()

    def publish(self, messages: Sequence[Sendable]) -> list[PublishResult]:
        until = time.monotonic() + self._timeout
        results: list[PublishResult] = []
        try:
            producer = self._producer = self._producer or self._connect()
            for message in messages:
                if time.monotonic() > until:
                    raise TimeoutError("The broker was too slow.")
                results.append(self._send(producer, message))
        except self._outages as error:
            self.close()
            results += [unknown(error)] * (len(messages) - len(results))
        return results

    def close(self) -> None:
        self._broker.collect()
        self._producer = None
        self._declared = set()

    def _connect(self) -> Producer:
        """A producer on the first host that answers, by kombu's failover."""
        self._broker.ensure_connection(
            max_retries=max(len(self._broker.alt) - 1, 0), timeout=self._timeout
        )
        return Producer(self._broker.channel())

    def _send(self, producer: Producer, message: Sendable) -> PublishResult:
        try:
            if message.queue and message.queue not in self._declared:
                declare(self._app, producer.channel, message.queue)
                self._declared.add(message.queue)
            _publish(producer, message)
        except self._outages:
            raise
        except Exception as error:  # this message alone is at fault, not the batch
            self._declared.discard(message.queue or "")
            return refused(error)
        return CONFIRMED


def _publish(producer: Producer, message: Sendable) -> None:
    """Publish *message*.

    An event is published to each queue by itself: the copies that kombu's virtual channels make
    share one delivery tag, so that acknowledging one would acknowledge the others.
    """
    channel = producer.channel
    if message.exchange != EVENT_EXCHANGE or not isinstance(channel, virtual.Channel):
        _require_route(channel, message)
        publish_with(producer, message)
        return
    event = message.whole()
    if not (queues := subscribers(channel.get_table(EVENT_EXCHANGE), event.routing_key)):
        raise unroutable(message)
    for queue in queues:
        publish_with(producer, replace(event, exchange="", routing_key=queue))


def _require_route(channel: Any, message: Sendable) -> None:
    """Raise ``Unroutable`` where kombu would silently drop *message*: no queue is bound."""
    if not isinstance(channel, virtual.Channel) or not message.exchange:
        return
    if message.exchange not in channel.state.exchanges:
        raise unroutable(message)
    exchange, table = channel.typeof(message.exchange), channel.get_table(message.exchange)
    if exchange.type != "fanout" and not exchange.lookup(
        table, message.exchange, message.routing_key, None
    ):
        raise unroutable(message)
