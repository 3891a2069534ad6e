"""What Celery would send, kept instead of sent: a producer without a connection.

It does what ``kombu.Producer.publish`` does up to the channel, with kombu's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from kombu import Producer, Queue


class _Unconnected:
    """Stands where Celery expects a broker connection, and connects to nothing.

    Its driver is none of those for which Celery routes a delay through the broker: the outbox
    keeps delays itself.
    """

    transport = type("transport", (), {"driver_type": "outbox"})
    default_channel = None
    recoverable_connection_errors = ()

    def _reraise_as_library_errors(self) -> nullcontext[None]:
        return nullcontext()


class RecordingProducer:
    """Stands where Celery expects a producer, and keeps the message instead of sending it."""

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
        """Serialize and keep what :meth:`kombu.Producer.publish` would send."""
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
            # Those that are None, too: without a priority kombu would write 0.
            "properties": properties,
        }

    def revive(self, channel: Any) -> None:
        """Nothing is connected, so there is nothing to revive."""

    def release(self) -> None:
        """Nothing was acquired."""

    def __enter__(self) -> RecordingProducer:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing was acquired."""


class RecordingPool:
    """Stands where Celery expects a producer pool; it never runs empty."""

    connections = type("connections", (), {"connection": _Unconnected()})

    def acquire(self, block: bool = False, timeout: float | None = None) -> RecordingProducer:
        return RecordingProducer()
