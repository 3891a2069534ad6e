"""Producers that Celery uses inside a transaction.

One has no connection and records the message of a call. It runs kombu's own code of
``kombu.Producer.publish``, up to the channel. The other takes a producer from the pool, but only if
something else than a call publishes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cached_property
from typing import Any

from kombu import Producer, Queue

# True while Celery makes the message of a call, which will be recorded.
_recording: ContextVar[bool] = ContextVar("celery_eda_recording", default=False)


@contextmanager
def recording(yes: bool) -> Iterator[None]:
    """A block in which Celery makes the message of a call, or calls back code of the user."""
    token = _recording.set(yes)
    try:
        yield
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    """True while Celery makes the message of a call that is captured."""
    return _recording.get()


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


class LazyProducer:
    """A producer that takes one from the pool of the app on its first use.

    Celery publishes a captured call without using its producer. Everything else goes to the broker.
    """

    def __init__(self, acquire: Callable[[], Any]) -> None:
        self._acquire = acquire

    @cached_property
    def _acquired(self) -> Any:
        return self._acquire()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._acquired, name)

    @property
    def connection(self) -> Any:
        """The connection to the broker; one to nothing while Celery makes a captured message."""
        return _Unconnected() if is_recording() else self._acquired.connection

    def release(self) -> None:
        """Return the producer to the pool, if one was taken."""
        if acquired := self.__dict__.pop("_acquired", None):
            acquired.release()

    def __enter__(self) -> LazyProducer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


class UndelayedPool:
    """The producer pool that Celery sees while it makes a message that will be recorded.

    Celery looks there for the broker's type, to find out whether the broker delays messages.
    """

    connections = type("connections", (), {"connection": _Unconnected()})

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)
