"""The queues of events, repairs and durable replies, which a worker consumes beside task queues.

A worker consumes all of them unless its option ``-Q`` names others. Each queue has a channel of its
own, so that messages prefetched from one do not delay those of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from celery import bootsteps
from kombu import Queue

from celery_eda.app import unsafe_queues
from celery_eda.brokers import AuxiliaryConsumer
from celery_eda.events import EXPIRES, Subscription

#: How often a worker redeclares its queues within the time after which an unused one expires.
RENEWALS = 4


class WorkerQueues(bootsteps.StartStopStep):
    """Consumes the queues of events, repairs and durable replies."""

    requires = ("celery_eda.inbox.intake:Intake",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        app = consumer.app
        self.subscriptions = app.eda.events.subscriptions
        chosen = app.amqp.queues._consume_from
        unsafe_queues.warn_of_unconsumed(
            [] if chosen is None else sorted(_own_names(app) - chosen.keys())
        )
        self.queues = [*_repairs_and_replies(app), *_subscribed(app)]
        self.per_worker = list(_per_worker(app, consumer.hostname))
        self.consumers: list[AuxiliaryConsumer] = []
        self.renewing: Any = None

    def start(self, consumer: Any) -> None:
        handle = consumer.create_task_handler()
        for queue, subscription in (*self.queues, *self.per_worker):
            auxiliary = AuxiliaryConsumer(
                consumer,
                queue,
                accept=consumer.app.conf.accept_content,
                on_message=self._addressing(queue.name, subscription, handle),
                on_decode_error=consumer.on_decode_error,
                prefetch_count=consumer.initial_prefetch_count,
            )
            auxiliary.open()
            self.consumers.append(auxiliary)
        # Messages may arrive at once, and the pool accepts none before the event loop runs.
        consumer.call_soon(self._consume)
        if self.per_worker:
            self.renewing = consumer.timer.call_repeatedly(
                EXPIRES / RENEWALS, consumer.call_soon, (self._renew,)
            )

    def _consume(self) -> None:
        for auxiliary in self.consumers:
            auxiliary.consume()

    def _renew(self) -> None:
        """Declare this worker's own queues again, so that the broker does not expire them."""
        for auxiliary in self.consumers[len(self.queues) :]:
            auxiliary.declare()

    def stop(self, consumer: Any) -> None:
        if self.renewing is not None:
            self.renewing.cancel()
        for auxiliary in self.consumers:
            auxiliary.stop()
        self.consumers = []

    def _addressing(
        self, queue: str, subscription: Subscription | None, handle: Callable[[Any], Any]
    ) -> Callable[[Any], Any]:
        """*handle*; for a *subscription*, each event is first made a call of its task."""
        if subscription is None:
            return handle

        def handle_addressed(message: Any) -> Any:
            self.subscriptions.address(message, subscription, queue)
            return handle(message)

        return handle_addressed


def _repairs_and_replies(app: Any) -> Iterator[tuple[Queue, None]]:
    """The queues of repairs and replies that the worker does not consume as task queues."""
    queues = app.amqp.queues
    if queues._consume_from is not None:
        return
    for name in sorted(_repair_and_reply_names(app)):
        if name not in queues:
            queue = queues[name]
            del queues[name]  # queues that remain there are consumed together with the tasks
            yield queue, None


def _repair_and_reply_names(app: Any) -> set[str]:
    eda = app.eda
    return {*eda.dead_letters.repair_tasks.queues, *filter(None, [eda.requests.store.address])}


def _own_names(app: Any) -> set[str]:
    """The names of all queues that a worker without ``-Q`` consumes beside the task queues."""
    return {*_repair_and_reply_names(app), *app.eda.events.subscriptions.by_queue}


def _subscribed(app: Any) -> Iterator[tuple[Queue, Subscription]]:
    """The queues of the app's subscriptions; with ``-Q`` only the ones named there."""
    queues, subscriptions = app.amqp.queues, app.eda.events.subscriptions
    chosen = queues._consume_from
    for name, subscription in sorted(subscriptions.by_queue.items()):
        if chosen is None or chosen.pop(name, None) is not None:
            queues.pop(name, None)  # Celery has created it because of the option
            yield app.eda.events.queues.queue_of(subscription), subscription


def _per_worker(app: Any, worker: str) -> Iterator[tuple[Queue, Subscription]]:
    """The queues that each worker has for itself, with or without ``-Q``."""
    for subscription in app.eda.events.subscriptions.per_worker.values():
        yield app.eda.events.queues.queue_for(subscription, worker), subscription
