"""RabbitMQ's dead-letter exchange: workers turn the messages that arrive there into dead letters.

A quorum queue counts deliveries. A message that exceeds the delivery limit, or is rejected, moves
to the service's queue of undelivered messages, and leaves its own queue only when it has arrived.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery.app.amqp import Queues
from kombu import Exchange, Queue

EXCHANGE = "celery_eda.undelivered"
#: RabbitMQ's reasons for dead-lettering a message.
DELIVERY_LIMIT = "delivery_limit"
REJECTED = "rejected"
EXPIRED = "expired"


def queue_of(service: str) -> Queue:
    """The queue of undelivered messages of *service*."""
    return Queue(
        f"{EXCHANGE}.{service}",
        Exchange(EXCHANGE, type="direct"),
        routing_key=service,
        queue_arguments={"x-queue-type": "quorum"},
    )


def queue_arguments(limit: int, service: str) -> dict[str, Any]:
    """The arguments of a quorum queue of *service* with *limit* deliveries a message."""
    return {
        "x-delivery-limit": limit,
        "x-dead-letter-exchange": EXCHANGE,
        "x-dead-letter-routing-key": service,
        # With this strategy RabbitMQ deletes the message only after the move is confirmed.
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


def with_delivery_limit(base: type[Queues], limit: int, service: str) -> type[Queues]:
    """A subclass of *base*, Celery's collection of queues, that limits its quorum queues."""
    arguments = queue_arguments(limit, service)

    class LimitedQueues(base):
        def __setitem__(self, name: str, queue: Queue) -> None:
            if (queue.queue_arguments or {}).get("x-queue-type") == "quorum":
                queue.queue_arguments = {**arguments, **queue.queue_arguments}
            super().__setitem__(name, queue)

    return LimitedQueues


def queue_in(headers: Mapping[str, Any]) -> str:
    """The queue that dead-lettered a message."""
    return str(_last_death(headers).get("queue", ""))


def origin_of(headers: Mapping[str, Any]) -> tuple[str, str, str]:
    """The reason for dead-lettering, and the exchange and routing key of the original message."""
    last = _last_death(headers)
    keys = last.get("routing-keys")
    key = keys[0] if isinstance(keys, list) and keys else ""
    return str(last.get("reason", "")), str(last.get("exchange", "")), str(key)


def _last_death(headers: Mapping[str, Any]) -> Mapping[str, Any]:
    deaths = headers.get("x-death")
    last = deaths[0] if isinstance(deaths, list) and deaths else {}
    return last if isinstance(last, Mapping) else {}
