"""What RabbitMQ itself gives up: it goes to a queue from which a worker makes dead letters of it.

A quorum queue counts deliveries. Beyond its limit, or when a message is rejected, the message goes
to another queue, and stays in the first one until that has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery.app.amqp import Queues
from kombu import Exchange, Queue

EXCHANGE = "celery_eda.undelivered"
#: A queue's reasons to give a message up.
DELIVERY_LIMIT = "delivery_limit"
REJECTED = "rejected"
EXPIRED = "expired"


def queue_of(service: str) -> Queue:
    """Where the messages go that the queues of *service* give up."""
    return Queue(
        f"{EXCHANGE}.{service}",
        Exchange(EXCHANGE, type="direct"),
        routing_key=service,
        queue_arguments={"x-queue-type": "quorum"},
    )


def limits(limit: int, service: str) -> dict[str, Any]:
    """The arguments of a quorum queue of *service* that delivers *limit* times at most."""
    return {
        "x-delivery-limit": limit,
        "x-dead-letter-exchange": EXCHANGE,
        "x-dead-letter-routing-key": service,
        # Only so does RabbitMQ confirm the move before it forgets the message.
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


def limiting(base: type[Queues], limit: int, service: str) -> type[Queues]:
    """*base*, Celery's collection of queues, whose quorum queues have such a limit."""
    arguments = limits(limit, service)

    class LimitingQueues(base):
        def __setitem__(self, name: str, queue: Queue) -> None:
            if (queue.queue_arguments or {}).get("x-queue-type") == "quorum":
                queue.queue_arguments = {**arguments, **queue.queue_arguments}
            super().__setitem__(name, queue)

    return LimitingQueues


def queue_in(headers: Mapping[str, Any]) -> str:
    """The queue that gave a message up."""
    return str(_last_death(headers).get("queue", ""))


def origin_of(headers: Mapping[str, Any]) -> tuple[str, str, str]:
    """Why a message was given up, and the exchange and routing key that it had come with."""
    last = _last_death(headers)
    keys = last.get("routing-keys")
    key = keys[0] if isinstance(keys, list) and keys else ""
    return str(last.get("reason", "")), str(last.get("exchange", "")), str(key)


def _last_death(headers: Mapping[str, Any]) -> Mapping[str, Any]:
    deaths = headers.get("x-death")
    last = deaths[0] if isinstance(deaths, list) and deaths else {}
    return last if isinstance(last, Mapping) else {}
