"""What the road needs of a broker: send a batch, and say of each message what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from kombu.common import Broadcast
from kombu.messaging import Producer

from celery_eda import topics
from celery_eda.event import EVENT_EXCHANGE
from celery_eda.identity import Identity
from celery_eda.message import Message


class Verdict(Enum):
    """What became of one message."""

    #: The broker has taken responsibility for this very message.
    confirmed = "confirmed"
    #: The broker refused this very message: unroutable, nacked, queue full, queue mismatch.
    refused = "refused"
    #: Nobody knows: the connection broke, or no answer came in time. It must be sent again.
    unknown = "unknown"


@dataclass(frozen=True)
class Answer:
    """The broker's answer to one message, with the broker's own words if it refused.

    Attributes:
        unroutable: whether it was refused because no queue would get it.
    """

    verdict: Verdict
    why: str = ""
    unroutable: bool = False


CONFIRMED = Answer(Verdict.confirmed)


class Unroutable(LookupError):
    """No queue would get a message."""


def refused(error: BaseException) -> Answer:
    """The answer to a message that is itself the reason of *error*."""
    return Answer(Verdict.refused, _words(error), unroutable=isinstance(error, Unroutable))


def unknown(error: BaseException) -> Answer:
    """The answer to messages that were on their way, or not sent yet, when *error* came."""
    return Answer(Verdict.unknown, _words(error))


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]  # it may quote what could not be encoded


class Sendable(Protocol):
    """A message that can be sent: its route, its body, and its envelope if it has one.

    Attributes:
        identity: id and revision, as they are in its headers.
        exchange: name of the exchange; empty for the default one.
        routing_key: the queue's name on the default exchange.
        queue: name of the queue to declare before sending, or None.
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

    A transport connects when it first sends, and again by itself after an outage.
    """

    def publish(self, messages: Sequence[Sendable]) -> list[Answer]:
        """Send messages and wait for the broker's answer to each.

        Takes at most the transport's time-out in all. Never raises for anything the broker or
        the network does: an outage is the answer ``unknown`` to every message it concerns.

        Args:
            messages: in the order of sending.

        Returns:
            One answer for each message, in the same order.
        """
        ...

    def close(self) -> None:
        """Drop the connection. Closing twice is harmless."""
        ...


@runtime_checkable
class Pipelined(Transport, Protocol):
    """A transport that sends a batch while those before it are not answered yet."""

    def begin(self, messages: Sequence[Sendable]) -> None:
        """Send messages, and wait until they are on their way."""
        ...

    def finish(self) -> list[Answer]:
        """Wait for the answers to the batch that was begun first, as :meth:`publish` gives them.

        Its time-out counts from its beginning, but what has been answered counts however late it
        is asked for. An outage makes unknown what is unanswered in any batch.
        """
        ...


class TransportFactory(Protocol):
    """Makes the transport of an app; *timeout* is in seconds and covers one batch."""

    def __call__(self, app: Any, *, timeout: float) -> Transport: ...


class EnvelopeTemplate(Protocol):
    """Makes the envelopes of messages that differ in some texts only.

    Args:
        message: one of them, with something of its own at each place that differs.
        envelope: its own.
        headers: the names of its headers that differ.
        properties: the names of its properties that do.

    Raises:
        ValueError: its places cannot be told apart.
    """

    def __init__(
        self, message: Message, envelope: bytes, headers: Iterable[str], properties: Iterable[str]
    ) -> None: ...

    def filled(self, values: Mapping[str, str]) -> bytes:
        """The envelope with these *values*; there may be more than are needed."""
        ...


class ReplyConsumer(Protocol):
    """The queues over which replies come to one process: one connection, used by one thread.

    It connects when the first queue is opened. Whatever goes wrong is raised; then it is of no
    more use.
    """

    def open(self, name: str) -> None:
        """Have the queue *name*, and take from it from now on."""
        ...

    def close(self, name: str) -> None:
        """Delete the queue *name*, with what is in it."""
        ...

    def take(self, timeout: float) -> list[Any]:
        """What has come, as kombu's messages; waits for the first, *timeout* seconds at most.

        What came and is no message is None.
        """
        ...

    def wake(self) -> None:
        """Have :meth:`take` return at once. For any thread."""
        ...

    def drop(self) -> None:
        """Forget the connection."""
        ...


@runtime_checkable
class KeepsMalformed(Protocol):
    """A channel that sets aside what it has taken and could not read as a message."""

    def malformed(self, limit: int) -> list[bytes]:
        """The oldest of them, *limit* at the most."""
        ...

    def forget_malformed(self, payload: bytes) -> None:
        """Drop one of them: it has been written down elsewhere. Repeating it is harmless."""
        ...


def publish_with(producer: Producer, message: Sendable) -> Any:
    """Let kombu's *producer* publish *message*, byte for byte as Celery would have.

    Returns:
        What its channel says to that.
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


def declare(app: Any, channel: Any, name: str) -> None:
    """Declare the queue that *app* knows as *name*, with its exchange and binding.

    Of a broadcast only the exchange: every consumer declares a queue of its own. By the name of
    the exchange of events, that and the subscriptions of *app*.

    Raises:
        KeyError: there is no such queue, and the app does not create missing ones.
    """
    if name == EVENT_EXCHANGE:
        app.eda.event_queues.declare(channel)
        return
    queue = app.amqp.queues[name]
    entity = queue.exchange if isinstance(queue, Broadcast) else queue
    entity.bind(channel).declare()


def subscribers(bindings: Iterable[tuple[str, Any, str]], name: str) -> list[str]:
    """The queues that the event *name* goes to, by kombu's *bindings* of the exchange of events.

    Kombu's own look-up is not asked: to it `order.#` does not choose `order`.
    """
    chosen = (queue for pattern, _, queue in bindings if topics.matches(pattern, name))
    return list(dict.fromkeys(chosen))


def unroutable(message: Sendable) -> Unroutable:
    """The error for a message that no queue would get, where the broker itself says nothing."""
    return Unroutable(
        f"No queue is bound to exchange {message.exchange!r} "
        f"with routing key {message.routing_key!r}."
    )
