"""Who wants which events: one durable queue for each handler, bound to the exchange of events.

An event comes to the queue of every subscription whose patterns choose it. There it is made a call
of that subscription's own task, so that each one retries, lags and fails alone, on the same road
as any other message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid5

from amqp.exceptions import NotFound
from kombu import Exchange, Queue, binding
from kombu.transport import virtual

from celery_eda import topics
from celery_eda.errors import ConfigurationError
from celery_eda.event import EVENT_EXCHANGE, EVENT_TASK, OF_ONE_WORKER
from celery_eda.identity import ORDER_HEADER
from celery_eda.limits import NAME_LENGTH

#: What the names of the queues begin with, before the service and the task.
PREFIX = "eda.on."
#: Seconds after which the queue of a worker that never came to take from it is gone.
FORGOTTEN = 60.0
EXCHANGE = Exchange(EVENT_EXCHANGE, type="topic")


@dataclass(frozen=True)
class Subscription:
    """One handler of events.

    Attributes:
        task: the name of its task.
        patterns: which events it handles.
        ordered: whether those of one category and key take effect one after the other.
        all: whether an ordered one also takes the events of the category that it does not want.
        every_worker: whether each worker gets what happens while it runs, instead of one of them
            what happens at any time.
    """

    task: str
    patterns: tuple[str, ...]
    ordered: bool = False
    all: bool = False
    every_worker: bool = False

    def wants(self, name: str) -> bool:
        """Whether it handles the event *name*."""
        return any(topics.matches(pattern, name) for pattern in self.patterns)

    @property
    def bindings(self) -> tuple[str, ...]:
        """The patterns of what comes to its queue.

        An ordered one is told of all events of a category, since they are counted together.
        """
        if not self.ordered:
            return self.patterns
        return tuple(f"{category}.#" for category in self.categories)

    @property
    def categories(self) -> tuple[str, ...]:
        """What is before the first dot of its patterns."""
        return tuple(sorted({topics.category_of(pattern) for pattern in self.patterns}))


@dataclass(frozen=True)
class Subscriptions:
    """The subscriptions of one app.

    Attributes:
        service: asks for the app's name among the services.
        arguments: asks for those with which the broker makes the queues.
        known: those that last, by the names of their tasks.
        private: those of every worker, likewise.
    """

    service: Callable[[], str]
    arguments: Callable[[], dict[str, Any]]
    known: dict[str, Subscription] = field(default_factory=dict)
    private: dict[str, Subscription] = field(default_factory=dict)

    def add(self, subscription: Subscription) -> None:
        """Let events come to *subscription*.

        Raises:
            ConfigurationError: it has no pattern, or what is in order is left open.
            InvalidEvent: something else is given for a pattern.
        """
        if not subscription.patterns:
            raise ConfigurationError(
                f"{subscription.task} subscribes to nothing. Give the events that it handles: "
                "`@eda.on('order.*')`."
            )
        for pattern in map(topics.checked_pattern, subscription.patterns):
            if subscription.ordered and topics.category_of(pattern) in ("*", "#"):
                raise ConfigurationError(
                    f"{subscription.task} wants {pattern!r} in order, and order is kept within a "
                    "category. Begin the pattern with one, as in 'order.#', or leave ordered out."
                )
        if subscription.every_worker and subscription.ordered:
            raise ConfigurationError(
                f"{subscription.task} wants events in order in every worker, but a worker misses "
                "those of before. Leave out ordered or every_worker."
            )
        kept = self.private if subscription.every_worker else self.known
        kept[subscription.task] = subscription

    def name_of(self, subscription: Subscription, worker: str = "") -> str:
        """The name of its queue; that of one *worker*, if every worker has its own.

        Raises:
            ConfigurationError: it is too long.
        """
        name = f"{PREFIX}{self.service()}.{subscription.task}"
        if subscription.every_worker:
            name = f"{OF_ONE_WORKER}{self.service()}.{subscription.task}.{worker}"
        if len(name.encode()) > NAME_LENGTH:
            raise ConfigurationError(
                f"{name} is too long for a queue: {NAME_LENGTH} bytes are the most. "
                "Give the subscription a shorter name: `@eda.on(…, name=…)`."
            )
        return name

    @property
    def by_queue(self) -> dict[str, Subscription]:
        """All of them, by the names of their queues."""
        return {self.name_of(each): each for each in self.known.values()}

    def queue_of(self, subscription: Subscription) -> Queue:
        """Its queue; declaring that makes it, the exchange, and what binds them."""
        return Queue(
            self.name_of(subscription),
            bindings=[binding(EXCHANGE, routing_key=each) for each in subscription.bindings],
            queue_arguments=self.arguments(),
        )

    def queue_for(self, subscription: Subscription, worker: str) -> Queue:
        """The queue that a *worker* has to itself, and that goes with it."""
        return Queue(
            self.name_of(subscription, worker),
            bindings=[binding(EXCHANGE, routing_key=each) for each in subscription.bindings],
            auto_delete=True,
            expires=FORGOTTEN,
        )

    def declare(self, channel: Any) -> None:
        """Make the exchange and all queues. Repeating it is harmless."""
        EXCHANGE.bind(channel).declare()
        for each in self.known.values():
            self.queue_of(each).bind(channel).declare()

    def waiting(self, channel: Any, queue: str) -> int | None:
        """How many messages wait in a *queue*; None if nobody has declared it."""
        if isinstance(channel, virtual.Channel):
            EXCHANGE.bind(channel).declare()
            if queue not in {bound for _, _, bound in channel.get_table(EVENT_EXCHANGE)}:
                return None
            return int(channel._size(queue))
        try:
            return int(channel.queue_declare(queue, passive=True).message_count)
        except NotFound:
            return None

    def drop(self, channel: Any, queue: str) -> None:
        """Delete a *queue*, with what is in it and what binds it. Repeating it is harmless."""
        if isinstance(channel, virtual.Channel):
            EXCHANGE.bind(channel).declare()
            for pattern, _, bound in channel.get_table(EVENT_EXCHANGE):
                if bound == queue:  # kombu takes away the bindings that it has seen
                    channel.queue_bind(queue, EVENT_EXCHANGE, pattern)
        channel.queue_delete(queue)

    def address(self, message: Any, subscription: Subscription, queue: str) -> None:
        """Make *message*, kombu's, that came to the *queue* of *subscription*, a call of its task.

        From then on it has that queue for its origin, where its retries and redrives go.
        """
        if not isinstance(message.delivery_info, dict):
            return
        message.delivery_info.update(exchange="", routing_key=queue)
        headers = message.headers
        if not isinstance(headers, dict) or headers.get("task") != EVENT_TASK:
            return
        headers["task"] = subscription.task
        headers["id"] = _own_id(headers, subscription)
        if not subscription.ordered:
            headers.pop(ORDER_HEADER, None)


def _own_id(headers: Mapping[str, Any], subscription: Subscription) -> Any:
    """Celery's id of the call, which has to differ from those of the other subscriptions."""
    try:
        return str(uuid5(UUID(headers["id"]), subscription.task))
    except (KeyError, TypeError, ValueError, AttributeError):
        return headers.get("id")  # whoever looks at the message next refuses it
