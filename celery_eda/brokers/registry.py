"""The brokers that celery_eda knows: one descriptor each.

No module of a broker is imported before an app that uses the broker needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from celery import Celery
from kombu.transport import TRANSPORT_ALIASES
from kombu.utils.imports import symbol_by_name
from sqlalchemy import URL

from celery_eda.brokers.base import (
    Broker,
    Envelopes,
    EnvelopeTemplate,
    ReplyConsumer,
    ReplyQueues,
    Transport,
)
from celery_eda.core.message import Message
from celery_eda.databases import Tables
from celery_eda.errors import ConfigurationError

if TYPE_CHECKING:
    from celery_eda.brokers.database.publish import DirectEnqueue

# Kombu has no entry point for transports, so importing this package registers ours.
TRANSPORT_ALIASES["eda"] = "celery_eda.brokers.database.consume:Transport"


def _rabbitmq() -> Broker:
    from kombu.transport import pyamqp

    from celery_eda.brokers.rabbitmq import consume
    from celery_eda.brokers.rabbitmq import envelopes as frames
    from celery_eda.brokers.rabbitmq import replies as rabbitmq_replies
    from celery_eda.brokers.rabbitmq import service_names as rabbitmq_names
    from celery_eda.brokers.rabbitmq.publish import RabbitMQ

    return Broker(
        transport=RabbitMQ,
        consumers={
            pyamqp.Transport: consume.Transport,
            pyamqp.SSLTransport: consume.SSLTransport,
        },
        replies=ReplyQueues(rabbitmq_replies.ReplyConsumer, rabbitmq_replies.declare),
        envelopes=Envelopes(frames.encode_envelope, frames.EnvelopeTemplate),
        hold_name=rabbitmq_names.hold,
    )


def _redis() -> Broker:
    from kombu.transport import redis

    from celery_eda.brokers.redis import consume
    from celery_eda.brokers.redis import envelopes as redis_envelopes
    from celery_eda.brokers.redis import replies as redis_replies
    from celery_eda.brokers.redis import service_names as redis_names
    from celery_eda.brokers.redis.publish import Redis

    return Broker(
        transport=Redis,
        consumers={
            redis.Transport: consume.Transport,
            redis.SentinelTransport: consume.SentinelTransport,
        },
        replies=ReplyQueues(redis_replies.ReplyConsumer, redis_replies.declare),
        envelopes=Envelopes(redis_envelopes.encode_envelope, redis_envelopes.EnvelopeTemplate),
        hold_name=redis_names.hold,
    )


def _database() -> Broker:
    from celery_eda.brokers.database import replies as database_replies
    from celery_eda.brokers.database.publish import Database

    return Broker(
        transport=Database,
        replies=ReplyQueues(database_replies.ReplyConsumer, database_replies.declare),
    )


def _generic() -> Broker:
    from celery_eda.brokers.generic import GenericTransport

    return Broker(transport=GenericTransport)


#: By the ``driver_type`` of kombu's transport, so that ``rediss`` and ``sentinel`` are ``redis``.
#: Other packages may add brokers: ``BROKERS["driver_type"] = "module:Class"``, the class of a
#: :class:`~celery_eda.brokers.base.Transport`, or a function that returns a descriptor.
BROKERS: dict[str, Callable[[], Broker] | str] = {
    "amqp": _rabbitmq,
    "redis": _redis,
    "eda": _database,
}


def broker_of_type(driver_type: str) -> Broker:
    """The descriptor for a ``driver_type`` of kombu; the generic one for unknown types."""
    found = BROKERS.get(driver_type, _generic)
    return Broker(transport=symbol_by_name(found)) if isinstance(found, str) else found()


def _driver_type_of(app: Celery) -> str:
    driver_type: str = app.connection_for_write().transport.driver_type
    return driver_type


def transport_of(app: Celery, *, timeout: float) -> Transport:
    """A transport to the broker that *app* publishes to; it connects on its first batch.

    A batch may take *timeout* seconds.
    """
    return broker_of_type(_driver_type_of(app)).transport(app, timeout=timeout)


def envelope_encoder_of(app: Celery) -> Callable[[Message], bytes | None] | None:
    """The encoder of envelopes for the broker of *app*; None if the broker takes none."""
    envelopes = broker_of_type(_driver_type_of(app)).envelopes
    return envelopes.encode if envelopes else None


def envelope_template_of(
    app: Celery, message: Message, headers: Iterable[str], properties: Iterable[str]
) -> EnvelopeTemplate | None:
    """The template for envelopes of messages that differ from *message* only in these entries.

    None if *message* has no envelope.

    Raises:
        ValueError: the entries of *message* cannot be told apart in its envelope.
    """
    envelopes = broker_of_type(_driver_type_of(app)).envelopes
    if envelopes is None or (envelope := envelopes.encode(message)) is None:
        return None
    return envelopes.template(message, envelope, headers, properties)


def is_database(url: str | None) -> bool:
    """True if the broker at *url* is a database."""
    return str(url or "").startswith("eda+")


def direct_enqueue_of(app: Celery, url: URL, tables: Tables) -> DirectEnqueue | None:
    """The direct way into the queues, if the broker of *app* is its own database, at *url*.

    None if the messages of *app* have to be sent by a relay.
    """
    if not is_database(app.conf.broker_write_url):
        return None
    from celery_eda.brokers.database import publish

    return publish.direct_enqueue_of(app, url, tables)


def reply_consumer_of(app: Celery, *, expires: float) -> ReplyConsumer:
    """A consumer of replies, whose queues are deleted after *expires* seconds without use.

    Raises:
        ConfigurationError: the broker has no reply queues.
    """
    return reply_queues_of(app).consumer(app, expires=expires)


def declare_reply_queue(app: Celery, name: str, expires: float) -> None:
    """Declare the reply queue *name* before a process consumes it. Repeating it is harmless.

    Raises:
        ConfigurationError: the broker has no reply queues.
    """
    reply_queues_of(app).declare(app, name, expires)


def reply_queues_of(app: Celery) -> ReplyQueues:
    """The reply queues of the broker of *app*.

    Raises:
        ConfigurationError: the broker has no reply queues.
    """
    driver_type = _driver_type_of(app)
    if (replies := broker_of_type(driver_type).replies) is None:
        raise ConfigurationError(
            "Replies to a process come over RabbitMQ, Redis or a database, and this broker is "
            f'{driver_type!r}. Ask with `address="durable"`: that works with every broker.'
        )
    return replies
