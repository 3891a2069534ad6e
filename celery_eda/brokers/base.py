"""The protocols of a broker: publish a batch and report the result of each message."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from celery import Celery
from kombu import Connection
from kombu.messaging import Producer

from celery_eda.core import topics
from celery_eda.core.identity import Identity
from celery_eda.core.message import Message


class Verdict(Enum):
    """The broker's decision on one message."""

    #: The broker has taken responsibility for this message.
    confirmed = "confirmed"
    #: The broker refused this message: unroutable, nacked, queue full, queue mismatch.
    refused = "refused"
    #: The message's queue is down, while the broker serves others. The message is not at fault.
    unavailable = "unavailable"
    #: The connection broke, or no answer came in time. The message must be sent again.
    unknown = "unknown"


@dataclass(frozen=True)
class PublishResult:
    """The result of publishing one message, with the broker's own words if it refused.

    Attributes:
        unroutable: True if the message was refused because no queue would get it.
        is_late: True if the answer is unknown because it did not come in time: the connection was
            not lost.
    """

    verdict: Verdict
    why: str = ""
    unroutable: bool = False
    is_late: bool = False


CONFIRMED = PublishResult(Verdict.confirmed)


class Unroutable(LookupError):
    """No queue would get a message."""


def refused(error: BaseException) -> PublishResult:
    """The result for a message that is itself the cause of *error*."""
    return PublishResult(Verdict.refused, _words(error), unroutable=isinstance(error, Unroutable))


def unavailable(error: BaseException) -> PublishResult:
    """The result for a message whose queue is down, by the broker's *error*."""
    return PublishResult(Verdict.unavailable, _words(error))


def unknown(error: BaseException, *, is_late: bool | None = None) -> PublishResult:
    """The result for messages that were in flight, or not sent yet, when *error* occurred.

    It *is_late* for Python's ``TimeoutError`` unless the caller says otherwise.
    """
    late = isinstance(error, TimeoutError) if is_late is None else is_late
    return PublishResult(Verdict.unknown, _words(error), is_late=late)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]  # it may quote what could not be encoded


class Sendable(Protocol):
    """A message that can be sent: its route, its body, and its envelope if it has one.

    Attributes:
        identity: id and revision, as they are in its headers.
        exchange: name of the exchange; empty for the default one.
        routing_key: the queue's name on the default exchange.
        queue: name of the queue, or of the exchange, to declare before sending, or None.
        body: the serialized body.
        envelope: headers and properties in the format of the broker; None if they have to be
            encoded from those of :meth:`whole`.
    """

    @property
    def identity(self) -> Identity: ...
    @property
    def exchange(self) -> str: ...
    @property
    def routing_key(self) -> str: ...
    @property
    def queue(self) -> str | None: ...
    @property
    def body(self) -> bytes: ...
    @property
    def envelope(self) -> bytes | None: ...

    def whole(self) -> Message:
        """All of the message, headers and properties included; may read it from a database.

        Raises:
            LookupError: the message is no longer there.
        """
        ...


class Transport(Protocol):
    """One connection to one broker, used by one thread.

    A transport connects when it first publishes, and reconnects by itself after an outage.
    """

    def publish(self, messages: Sequence[Sendable]) -> list[PublishResult]:
        """Publish messages and wait for the broker's answer to each.

        Takes at most the transport's time-out in all. Never raises because of the broker or the
        network: an outage gives ``unknown`` for every message it concerns.

        Args:
            messages: in the order of sending.

        Returns:
            One result for each message, in the same order.
        """
        ...

    def close(self) -> None:
        """Drop the connection. Closing twice is harmless."""
        ...


@runtime_checkable
class Pipelined(Transport, Protocol):
    """A transport that sends a batch while earlier batches are still unanswered."""

    def begin(self, messages: Sequence[Sendable]) -> None:
        """Send messages without waiting for the answers."""
        ...

    def finish(self) -> list[PublishResult]:
        """Wait for the answers to the oldest batch begun; the results are those of ``publish``.

        The batch's time-out counts from its ``begin``, but an answer that has arrived counts
        however late it is collected. An outage makes every unanswered message of all batches
        ``unknown``.
        """
        ...


class EnvelopeTemplate(Protocol):
    """Makes the envelopes of messages that differ only in some texts.

    Args:
        message: an example, with a unique text in each header and property that differs.
        envelope: the example's envelope.
        headers: the names of the headers that differ.
        properties: the names of the properties that differ.

    Raises:
        ValueError: the texts cannot be told apart in the envelope.
    """

    def __init__(
        self, message: Message, envelope: bytes, headers: Iterable[str], properties: Iterable[str]
    ) -> None: ...

    def filled(self, values: Mapping[str, str]) -> bytes:
        """The envelope with these *values*; values without a slot in it are ignored."""
        ...


class ReplyConsumer(Protocol):
    """The queues over which one process receives replies: one connection, used by one thread.

    The first ``open`` connects. Every error is raised, and makes the consumer unusable.
    """

    def open(self, name: str) -> None:
        """Declare the queue *name* and consume it from now on."""
        ...

    def close(self, name: str) -> None:
        """Delete the queue *name* with its messages."""
        ...

    def take(self, timeout: float) -> list[Any]:
        """Wait *timeout* seconds at most for replies.

        Returns:
            The replies as kombu's messages; None in place of a payload that is not a message.
        """
        ...

    def wake(self) -> None:
        """Make :meth:`take` return at once. Any thread may call it."""
        ...

    def drop(self) -> None:
        """Drop the connection."""
        ...


@dataclass(frozen=True)
class ReplyQueues:
    """The parts of a broker that transport replies to a waiting process.

    Attributes:
        consumer: makes the consumer of an app; ``expires`` is in seconds.
        declare: declares a queue by name, which expires after so many seconds without use.
    """

    consumer: Callable[..., ReplyConsumer]
    declare: Callable[[Celery, str, float], None]


@dataclass(frozen=True)
class Envelopes:
    """The parts of a broker that encode headers and properties when a message is captured.

    Attributes:
        encode: returns the envelope of a message, or None if it can have none.
        template: makes envelopes of messages that differ only in some texts.
    """

    encode: Callable[[Message], bytes | None]
    template: type[EnvelopeTemplate]


@dataclass(frozen=True)
class Broker:
    """The descriptor of one kind of broker: every part that celery_eda has for it.

    Attributes:
        transport: makes the transport of an app; ``timeout`` is in seconds and covers one batch.
        consumers: transports that workers use in place of kombu's, by kombu's class.
        replies: None if no process can wait for replies over this broker.
        envelopes: None if messages are encoded only when they are sent.
        hold_name: holds the name of a service for its *owner*, over a connection of kombu's, for
            so many seconds; False if another owner holds it. None if this broker cannot.
    """

    transport: Callable[..., Transport]
    consumers: Mapping[type, type] = field(default_factory=dict)
    replies: ReplyQueues | None = None
    envelopes: Envelopes | None = None
    hold_name: Callable[[Connection, str, str, float], bool] | None = None


@runtime_checkable
class KeepsMalformed(Protocol):
    """A channel that sets aside payloads that it could not read as messages."""

    def malformed(self, limit: int) -> list[bytes]:
        """The oldest *limit* of those payloads."""
        ...

    def delete_malformed(self, payload: bytes) -> None:
        """Delete one payload, which has been recorded elsewhere. Repeating it is harmless."""
        ...


def publish_with(producer: Producer, message: Sendable) -> Any:
    """Publish *message* with kombu's *producer*, byte for byte as Celery would.

    Returns:
        The result of the producer's channel.
    """
    whole = message.whole()
    return producer.publish(
        whole.body,
        content_type=whole.content_type,
        content_encoding=whole.content_encoding,
        headers=dict(whole.headers),
        exchange=whole.exchange,
        routing_key=whole.routing_key,
        **whole.properties,
    )


def subscribers(bindings: Iterable[tuple[str, Any, str]], name: str) -> list[str]:
    """The queues that get the event *name*, by kombu's *bindings* of the exchange of events.

    Kombu's own lookup is not used: in it the pattern ``order.#`` does not match ``order``.
    """
    matching = (queue for pattern, _, queue in bindings if topics.matches(pattern, name))
    return list(dict.fromkeys(matching))


def unroutable(message: Sendable) -> Unroutable:
    """The error for an unroutable message, where the broker itself reports none."""
    return Unroutable(
        f"No queue is bound to exchange {message.exchange!r} "
        f"with routing key {message.routing_key!r}."
    )
