"""A producer without a connection, which records the message that Celery publishes.

It runs kombu's own code of ``kombu.Producer.publish``, up to the channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from kombu import Producer, Queue


class _Unconnected:
    """A broker connection, as Celery sees it, that connects to nothing.

    For some driver types Celery has the broker delay messages. This one is none of them: the outbox
    delays messages.
    """

    transport = type("transport", (), {"driver_type": "outbox"})
    default_channel = None
    recoverable_connection_errors = ()

    def _reraise_as_library_errors(self) -> nullcontext[None]:
        return nullcontext()


class RecordingProducer:
    """A producer, as Celery sees it, that records the message instead of sending it."""

    connection = _Unconnected()
    channel = None

    def __init__(self) -> None:
        self.recorded: dict[str, Any] = {}
        self.declare: Sequence[Any] = ()

    def publish(
        self,
        body: Any,
        routing_key: str | None = None,
        exchange: Any = None,
        headers: dict[str, Any] | None = None,
        serializer: str | None = None,
        compression: str | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        delivery_mode: Any = None,
        declare: Sequence[Any] | None = None,
        retry: Any = None,
        retry_policy: Any = None,
        timeout: Any = None,
        confirm_timeout: Any = None,
        **properties: Any,
    ) -> None:
        """Serialize and record the message that :meth:`kombu.Producer.publish` would send."""
        kombu = Producer(None)
        headers = {} if headers is None else headers
        name, properties["delivery_mode"] = kombu._delivery_details(
            exchange or kombu.exchange, delivery_mode
        )
        body, content_type, content_encoding = kombu._prepare(
            body, serializer, content_type, content_encoding, compression, headers
        )
        if isinstance(reply_to := properties.get("reply_to"), Queue):
            properties["reply_to"] = reply_to.name
        self.declare = declare or ()
        self.recorded = {
            "body": body.encode() if isinstance(body, str) else body,
            "content_type": content_type,
            "content_encoding": content_encoding,
            "headers": headers,
            "exchange": name,
            "routing_key": routing_key or "",
            # Including those that are None: without a priority kombu would write 0.
            "properties": properties,
        }

    def revive(self, channel: Any) -> None:
        """Do nothing: there is no connection to revive."""

    def release(self) -> None:
        """Do nothing: no connection was acquired."""

    def __enter__(self) -> RecordingProducer:
        return self

    def __exit__(self, *exception: object) -> None:
        """Do nothing: no connection was acquired."""


class RecordingPool:
    """A producer pool, as Celery sees it, that never runs empty."""

    connections = type("connections", (), {"connection": _Unconnected()})

    def acquire(self, block: bool = False, timeout: float | None = None) -> RecordingProducer:
        return RecordingProducer()
