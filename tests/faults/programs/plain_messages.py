"""The system under fault with a task that sends what is no call of a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kombu import Exchange, Queue

from tests.faults.programs.order_system import app as app  # what `celery -A` looks for
from tests.faults.programs.order_system import eda, record

RAW = Queue("raw", Exchange("raw"), routing_key="raw")
LIMITED = "road.charge"


def publish_raw(producer: Any, number: int) -> None:
    """Publish a message of kombu."""
    producer.publish(
        {"number": number},
        serializer="json",
        exchange=RAW.exchange,
        routing_key="raw",
        declare=[RAW],
    )


def by_producer(task: Any, number: int) -> None:
    with app.producer_or_acquire() as producer:
        publish_raw(producer, number)


def by_pool(task: Any, number: int) -> None:
    with app.producer_pool.acquire(block=True) as producer:
        publish_raw(producer, number)


def by_revoke(task: Any, number: int) -> None:
    app.control.revoke(f"revoked {number}")


def by_result(task: Any, number: int) -> None:
    app.AsyncResult(f"revoked {number}").revoke()


def by_broadcast(task: Any, number: int) -> None:
    arguments = {"task_name": LIMITED, "rate_limit": f"{number}/s"}
    app.control.broadcast("rate_limit", arguments=arguments)


def by_inspect(task: Any, number: int) -> None:
    if not app.control.inspect(timeout=60.0, limit=1).ping():
        raise LookupError("no worker has replied")


def by_event(task: Any, number: int) -> None:
    task.send_event("task-progress", percent=number)


def by_state(task: Any, number: int) -> None:
    task.update_state(state="PROGRESS", meta={"percent": number})


WAYS: dict[str, Callable[[Any, int], None]] = {
    each.__name__: each
    for each in (
        by_producer,
        by_pool,
        by_revoke,
        by_result,
        by_broadcast,
        by_inspect,
        by_event,
        by_state,
    )
}


@eda.task(name="road.say", bind=True)
def say(self: Any, way: str, number: int) -> int:
    record("say", number)
    WAYS[way](self, number)
    return number
