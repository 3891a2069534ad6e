"""Queues that lose messages, or that nobody might consume: a worker warns of them at its start.

A message of a reliable task takes effect once if its queue keeps it until it is acknowledged. Some
arguments of queues say otherwise, and the option ``-Q`` leaves out the queues of celery_eda.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

from celery import Celery
from kombu import Queue
from kombu.common import Broadcast

from celery_eda.inbox import ReliableTask

log = logging.getLogger(__name__)

TRANSIENT = 1
LIMITS = {"x-max-length", "x-max-length-bytes"}


def warn_of_unsafe(app: Celery) -> None:
    """Warn of each queue that this worker consumes and that can lose a message."""
    for queue in app.amqp.queues.consume_from.values():
        if isinstance(queue, Broadcast):
            _warn_of_broadcast(app, queue)
        elif reasons := list(_reasons(queue)):
            log.warning(
                "the queue %s can lose messages: %s. Route reliable tasks to another queue.",
                queue.name,
                "; ".join(reasons),
            )


def warn_of_unconsumed(names: Collection[str]) -> None:
    """Warn that this worker leaves out the queues of celery_eda with these *names*."""
    if names:
        log.warning(
            "because of -Q this worker does not consume %s. Unless another worker does, what waits "
            "there (replies to sagas, repairs, events) is not handled. Add them to -Q, or start a "
            "worker without -Q.",
            ", ".join(names),
        )


def warn_of_left_behind(app: Celery) -> None:
    """Warn of messages in the service's own database, if that is no longer the broker."""
    if waiting := app.eda.brokers.left_behind():
        log.warning(
            "%d messages wait in this database from when it was the broker (%s). Run a worker with "
            "that broker_url until they are handled.",
            sum(waiting.values()),
            ", ".join(sorted(waiting)),
        )


def _warn_of_broadcast(app: Celery, queue: Broadcast) -> None:
    routed = [
        task.name
        for task in app.tasks.values()
        if isinstance(task, ReliableTask) and _exchange_of(app, task.name) == queue.exchange.name
    ]
    if routed:
        log.warning(
            "reliable tasks are routed to the broadcast %s: %s. Each message takes effect in one "
            "worker only. Make them plain tasks, or use eda.on(…, every_worker=True).",
            queue.exchange.name,
            ", ".join(sorted(routed)),
        )


def _exchange_of(app: Celery, task: str) -> str | None:
    """The exchange that the app's routes choose for *task*, if they name a queue."""
    queue = app.amqp.router.route({}, task).get("queue")
    return queue.exchange.name if isinstance(queue, Queue) else None


def _reasons(queue: Queue) -> Iterator[str]:
    """The arguments of *queue* by which a message can vanish, as a person would say it."""
    arguments = queue.queue_arguments or {}
    if queue.no_ack:
        yield "with no_ack the message of a worker that dies is gone"
    if not queue.durable or queue.exclusive or queue.auto_delete:
        yield "it is not durable, so it ends with the broker or with its consumer"
    if queue.exchange.delivery_mode == TRANSIENT:
        yield "with delivery_mode 1 a message is gone when the broker restarts"
    if "x-dead-letter-exchange" in arguments:
        return
    if queue.message_ttl is not None or "x-message-ttl" in arguments:
        yield "messages expire (message_ttl) without becoming dead letters"
    if queue.expires is not None or "x-expires" in arguments:
        yield "it expires with its messages"
    is_limited = queue.max_length or queue.max_length_bytes or LIMITS & arguments.keys()
    if is_limited and arguments.get("x-overflow") != "reject-publish":
        yield "beyond max_length it drops messages (x-overflow: reject-publish keeps them)"
