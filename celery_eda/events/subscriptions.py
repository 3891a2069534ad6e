"""The subscriptions of an app: its handlers of events, and the events that each one handles.

The broker copies an event to the queue of every subscription with a matching pattern. The worker
rewrites each copy into a call of the subscription's own task, so that each subscription retries,
lags and fails on its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid5

from celery_eda.core import topics
from celery_eda.core.event import EVENT_TASK, OF_ONE_WORKER
from celery_eda.core.identity import ORDER_HEADER
from celery_eda.core.limits import NAME_LENGTH
from celery_eda.core.service import Service
from celery_eda.errors import ConfigurationError

#: The prefix of the queues' names, before the service and the task.
PREFIX = "eda.on."


@dataclass(frozen=True)
class Subscription:
    """One handler of events.

    Attributes:
        task: the name of its task.
        patterns: of the names of the events to handle.
        ordered: True to handle the events of one category and key one after the other.
        all: True if an ordered handler is also called with the other events of its categories.
        every_worker: True if each running worker gets a copy of each event; a worker that is not
            running gets none. Otherwise one worker gets it, now or later.
    """

    task: str
    patterns: tuple[str, ...]
    ordered: bool = False
    all: bool = False
    every_worker: bool = False

    def wants(self, name: str) -> bool:
        """True if a pattern matches the event *name*."""
        return any(topics.matches(pattern, name) for pattern in self.patterns)

    @property
    def bindings(self) -> tuple[str, ...]:
        """The binding keys of its queue.

        An ordered subscription receives all events of its categories, since the sequence numbers
        count them together.
        """
        if not self.ordered:
            return self.patterns
        return tuple(f"{category}.#" for category in self.categories)

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories of its patterns, sorted."""
        return tuple(sorted({topics.category_of(pattern) for pattern in self.patterns}))


@dataclass(frozen=True)
class Subscriptions:
    """The subscriptions of one app.

    Attributes:
        known: subscriptions with a durable queue, by task.
        per_worker: subscriptions with a queue for each worker, by task.
    """

    service: Service
    known: dict[str, Subscription] = field(default_factory=dict)
    per_worker: dict[str, Subscription] = field(default_factory=dict)

    def add(self, subscription: Subscription) -> None:
        """Register *subscription*.

        Raises:
            ConfigurationError: there is no pattern, or *ordered* is used without a category or
                together with *every_worker*.
            InvalidEvent: a pattern is malformed.
        """
        if not subscription.patterns:
            raise ConfigurationError(
                f"{subscription.task} subscribes to no event. Name the events to handle: "
                "`@eda.on('order.*')`."
            )
        for pattern in map(topics.checked_pattern, subscription.patterns):
            if subscription.ordered and topics.category_of(pattern) in ("*", "#"):
                raise ConfigurationError(
                    f"{subscription.task} wants {pattern!r} in order, but only the events of one "
                    "category have an order. Begin the pattern with a category, as in 'order.#', "
                    "or leave out ordered."
                )
        if subscription.every_worker and subscription.ordered:
            raise ConfigurationError(
                f"{subscription.task} wants events in order in every worker, but a worker misses "
                "the events before its start. Leave out ordered or every_worker."
            )
        registered = self.per_worker if subscription.every_worker else self.known
        registered[subscription.task] = subscription

    def name_of(self, subscription: Subscription, worker: str = "") -> str:
        """Return the name of the queue of *subscription*, or of its queue for one *worker*.

        Raises:
            ConfigurationError: the name is longer than 255 bytes.
        """
        name = f"{PREFIX}{self.service.name}.{subscription.task}"
        if subscription.every_worker:
            name = f"{OF_ONE_WORKER}{self.service.name}.{subscription.task}.{worker}"
        if len(name.encode()) > NAME_LENGTH:
            raise ConfigurationError(
                f"{name} is too long for a queue: the limit is {NAME_LENGTH} bytes. "
                "Give the subscription a shorter name: `@eda.on(…, name=…)`."
            )
        return name

    @property
    def by_queue(self) -> dict[str, Subscription]:
        """The subscriptions with a durable queue, by the name of the queue."""
        return {self.name_of(each): each for each in self.known.values()}

    def readdress(self, message: Any, queue: str) -> None:
        """Rewrite *message*, kombu's, into a call, if *queue* belongs to a subscription."""
        if subscription := self.by_queue.get(queue):
            self.address(message, subscription, queue)

    def address(self, message: Any, subscription: Subscription, queue: str) -> None:
        """Rewrite *message*, from the *queue* of *subscription*, into a call of its task.

        Retries and redrives of the message go to *queue* alone, not to the exchange.

        Args:
            message: kombu's.
            subscription: the consumer.
            queue: the queue that the message came from.
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
    """The task id of the call, unique to the subscription; the same for each copy of the event."""
    try:
        return str(uuid5(UUID(headers["id"]), subscription.task))
    except (KeyError, TypeError, ValueError, AttributeError):
        return headers.get("id")  # malformed: the inspection refuses the message
