"""One file per broker; each writes only what differs in sending a batch and hearing of its fate.

Nothing of a broker is imported before an app that uses it connects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kombu import Connection
from kombu.transport import TRANSPORT_ALIASES
from kombu.utils.imports import symbol_by_name
from sqlalchemy import URL

from celery_eda.errors import ConfigurationError
from celery_eda.message import Message
from celery_eda.tables import Tables
from celery_eda.transports.base import EnvelopeTemplate, ReplyConsumer, Transport

if TYPE_CHECKING:
    from typing_extensions import Self

    from celery_eda.transports.database import DirectEnqueue

#: By the ``driver_type`` of kombu's transport, so that ``rediss`` and ``sentinel`` are ``redis``.
#: A broker from elsewhere is added as ``ALIASES["driver_type"] = "module:Class"``.
ALIASES = {
    "amqp": "celery_eda.transports.rabbitmq:RabbitMQ",
    "redis": "celery_eda.transports.redis:Redis",
    "eda": "celery_eda.transports.database:Database",
}
OTHERS = "celery_eda.transports.plain:Plain"
#: What encodes headers and properties beforehand, by the same name.
ENVELOPES = {
    "amqp": "celery_eda.transports.frames",
    "redis": "celery_eda.transports.redis_envelopes",
}
#: What workers take their messages with, instead of kombu's transport of that name.
TAKING = {
    "kombu.transport.redis:Transport": "celery_eda.transports.redis_taking:Transport",
    "kombu.transport.pyamqp:Transport": "celery_eda.transports.rabbitmq_taking:Transport",
    "kombu.transport.pyamqp:SSLTransport": "celery_eda.transports.rabbitmq_taking:SSLTransport",
}

#: Where replies come in, by the same name: what takes them, and what makes a queue for them.
REPLY_QUEUES = {
    "amqp": "celery_eda.transports.rabbitmq_replies",
    "redis": "celery_eda.transports.redis_replies",
    "eda": "celery_eda.transports.database_replies",
}


# Kombu has no entry point for transports: whoever imports this package has ours.
TRANSPORT_ALIASES["eda"] = "celery_eda.transports.database_taking:Transport"


class SafeConnection(Connection):
    """Kombu's connection; to some brokers, one that loses nothing when its worker dies, and that
    no message can break.
    """

    @classmethod
    def made(cls, tables: Callable[[], Tables], url: str, *args: Any, **options: Any) -> Self:
        """A connection to the broker at *url*; if that is a database, with these *tables* in it."""
        if is_database(url):
            names = {"table_prefix": tables().prefix, "schema": tables().schema}
            options["transport_options"] = {**names, **(options.get("transport_options") or {})}
        return cls(url, *args, **options)

    def get_transport_cls(self) -> Any:
        transport = super().get_transport_cls()
        own = TAKING.get(f"{transport.__module__}:{transport.__qualname__}")
        return symbol_by_name(own) if own else transport


def transport_of(app: Any, *, timeout: float, vendor: str | None = None) -> Transport:
    """A transport to the broker that *app* writes to; it connects when it first sends.

    A batch may take *timeout* seconds. *vendor* is an alias or ``"module:Class"`` to be taken
    instead of what the broker's URL says.
    """
    if vendor is None:
        vendor = app.connection_for_write().transport.driver_type
    factory = symbol_by_name(ALIASES.get(vendor, vendor if ":" in vendor else OTHERS))
    transport: Transport = factory(app, timeout=timeout)
    return transport


def seal_of(app: Any) -> Callable[[Message], bytes | None] | None:
    """What encodes headers and properties as the broker of *app* wants them, if it wants that."""
    envelopes = _envelopes_of(app)
    seal: Callable[[Message], bytes | None] | None = envelopes and envelopes.seal
    return seal


def template_of(
    app: Any, message: Message, headers: Iterable[str], properties: Iterable[str]
) -> EnvelopeTemplate | None:
    """What makes the envelopes of messages that differ from *message* in these places only.

    None if they have none.

    Raises:
        ValueError: it cannot be made of this one.
    """
    envelopes = _envelopes_of(app)
    if envelopes is None or (envelope := envelopes.seal(message)) is None:
        return None
    template: EnvelopeTemplate = envelopes.EnvelopeTemplate(message, envelope, headers, properties)
    return template


def _envelopes_of(app: Any) -> Any:
    module = ENVELOPES.get(app.connection_for_write().transport.driver_type)
    return import_module(module) if module else None


def is_database(url: str | None) -> bool:
    """Whether the broker at *url* is a database."""
    return str(url or "").startswith("eda+")


def direct_enqueue_of(app: Any, url: URL, tables: Tables) -> DirectEnqueue | None:
    """What puts messages straight into their queues; None where they have to be sent.

    They need not be sent if the broker of *app* is the database at *url* itself.
    """
    if not is_database(app.conf.broker_write_url):
        return None
    found: DirectEnqueue | None = import_module("celery_eda.transports.database").direct_enqueue_of(
        app, url, tables
    )
    return found


def reply_queues_of(app: Any, *, expires: float) -> Callable[[], ReplyConsumer]:
    """Makes what replies come in through; a queue goes when it was left for *expires* seconds.

    Raises:
        ConfigurationError: this broker has no such queues.
    """
    return partial(_replies_of(app).ReplyConsumer, app, expires=expires)


def declare_reply_queue(app: Any, name: str, expires: float) -> None:
    """Make the reply queue *name*, before somebody takes from it. Repeating it is harmless."""
    _replies_of(app).declare(app, name, expires)


def _replies_of(app: Any) -> Any:
    vendor = app.connection_for_write().transport.driver_type
    if vendor not in REPLY_QUEUES:
        raise ConfigurationError(
            "Replies to a process come over RabbitMQ, Redis or a database, and this broker is "
            f"{vendor!r}. "
            'Ask with `address="durable"`: that works with every broker.'
        )
    return import_module(REPLY_QUEUES[vendor])
