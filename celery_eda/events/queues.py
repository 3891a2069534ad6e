"""The queues of subscriptions on the broker, bound to the exchange of events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from amqp.exceptions import NotFound
from kombu import Exchange, Queue, binding
from kombu.transport import virtual

from celery_eda.brokers import own_queues
from celery_eda.core.event import EVENT_EXCHANGE
from celery_eda.core.service import Service
from celery_eda.events.subscriptions import Subscription, Subscriptions

#: Seconds without a consumer after which the queue of one worker is deleted.
EXPIRES = 60.0
EXCHANGE = Exchange(EVENT_EXCHANGE, type="topic")


@dataclass(frozen=True)
class EventQueues:
    """The queues of one app's subscriptions."""

    service: Service
    subscriptions: Subscriptions

    def queue_of(self, subscription: Subscription) -> Queue:
        """Return the durable queue of *subscription*.

        Declaring the queue declares the exchange and the bindings too.
        """
        return Queue(
            self.subscriptions.name_of(subscription),
            bindings=_bindings(subscription),
            queue_arguments=own_queues.arguments_of(self.service),
        )

    def queue_for(self, subscription: Subscription, worker: str) -> Queue:
        """Return the queue of one *worker*, which the broker deletes after the worker has ended."""
        return Queue(
            self.subscriptions.name_of(subscription, worker),
            bindings=_bindings(subscription),
            auto_delete=True,
            expires=EXPIRES,
        )

    def declare(self, channel: Any) -> None:
        """Declare the exchange and all durable queues. Idempotent."""
        EXCHANGE.bind(channel).declare()
        for each in self.subscriptions.known.values():
            self.queue_of(each).bind(channel).declare()

    def waiting(self, channel: Any, queue: str) -> int | None:
        """Return the number of messages in a *queue*; None if the queue does not exist."""
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
        """Delete a *queue* with its messages and bindings. Idempotent."""
        if isinstance(channel, virtual.Channel):
            EXCHANGE.bind(channel).declare()
            # kombu deletes only bindings that were made over this channel.
            for pattern, _, bound in channel.get_table(EVENT_EXCHANGE):
                if bound == queue:
                    channel.queue_bind(queue, EVENT_EXCHANGE, pattern)
        channel.queue_delete(queue)


def _bindings(subscription: Subscription) -> list[binding]:
    return [binding(EXCHANGE, routing_key=each) for each in subscription.bindings]
