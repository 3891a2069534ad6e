"""The broker of one service."""

from __future__ import annotations

from collections.abc import Callable

from kombu import Connection
from sqlalchemy import func, select

from celery_eda.brokers.base import ReplyConsumer, Transport
from celery_eda.brokers.database.publish import DirectEnqueue
from celery_eda.brokers.registry import (
    broker_of_type,
    direct_enqueue_of,
    envelope_encoder_of,
    is_database,
    reply_consumer_of,
    reply_queues_of,
    transport_of,
)
from celery_eda.brokers.topology import Topology
from celery_eda.core.message import Message
from celery_eda.core.once import cached_once
from celery_eda.core.service import Service
from celery_eda.databases import Databases


class Brokers:
    """Connections to the broker that the Celery app is configured with.

    Attributes:
        topology: declares queues before the first message to them.
    """

    def __init__(self, service: Service, databases: Databases) -> None:
        self._service = service
        self._databases = databases
        self.topology = Topology(service)
        service.add(self)

    @cached_once
    def encode_envelope(self) -> Callable[[Message], bytes | None] | None:
        """Encodes headers and properties as the broker sends them; None if it has no such form."""
        return envelope_encoder_of(self._service.app)

    @cached_once
    def direct(self) -> DirectEnqueue | None:
        """Puts messages into queues, if the service's own database is the broker."""
        databases = self._databases
        return direct_enqueue_of(self._service.app, databases.url, databases.tables)

    def connect(self) -> Transport:
        """A new transport, for one thread; it opens its connection with the first batch."""
        return transport_of(self._service.app, timeout=self._service.settings.publish_timeout)

    def hold_name(self, connection: Connection, owner: str, expires: float) -> bool:
        """Hold the name of this service for *owner* during the next *expires* seconds.

        Returns:
            False if another owner holds it. A broker that cannot hold names refuses nobody.
        """
        hold = broker_of_type(connection.transport.driver_type).hold_name
        return hold is None or hold(connection, self._service.name, owner, expires)

    def left_behind(self) -> dict[str, int]:
        """The numbers of messages that wait in the service's own database, by queue.

        Empty if that database is the broker: it was the broker once. Queues that belong to a
        process do not count.
        """
        if is_database(self._service.app.conf.broker_read_url):
            return {}
        queue, bindings = self._databases.tables.queue, self._databases.tables.bindings
        owned = select(bindings.c.queue).where(bindings.c.owner.is_not(None))
        waiting = select(queue.c.queue, func.count()).where(queue.c.queue.not_in(owned))
        with self._databases.engine.connect() as connection:
            rows = connection.execute(waiting.group_by(queue.c.queue))
            return {row[0]: row[1] for row in rows}

    def check_replies(self) -> None:
        """Refuse a broker over which no replies can come.

        Raises:
            ConfigurationError: the broker has no reply queues.
        """
        reply_queues_of(self._service.app)

    def consume_replies(self) -> ReplyConsumer:
        """A new consumer of replies to this process, for one thread.

        Raises:
            ConfigurationError: the broker has no reply queues.
        """
        return reply_consumer_of(self._service.app, expires=self._service.settings.reply_expires)
