"""Where a worker takes events, repairs and replies to durable requests from.

It takes from all of them, unless ``-Q`` says otherwise. Each queue has a channel of its own, so
that what is prefetched from one keeps nothing back from the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from celery import bootsteps
from kombu import Queue
from kombu.common import ignore_errors

from celery_eda.event_queues import EXPIRES
from celery_eda.subscriptions import Subscription

#: How often a worker says that it is still there, in the time after which it is forgotten.
RENEWALS = 4


class OwnQueues(bootsteps.StartStopStep):
    """Consumes them beside the queues of the tasks."""

    requires = ("celery_eda.intake:Intake",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        app = consumer.app
        self.subscriptions = app.eda.subscriptions
        self.queues = [*_own(app), *_subscribed(app)]
        self.private = list(_private(app, consumer.hostname))
        self.consumers: list[Any] = []
        self.renewing: Any = None

    def start(self, consumer: Any) -> None:
        handle = consumer.create_task_handler()
        for queue, subscription in (*self.queues, *self.private):
            beside = consumer.app.amqp.TaskConsumer(
                consumer.connection.channel(),
                queues=[queue],
                on_message=self._addressing(queue.name, subscription, handle),
                on_decode_error=consumer.on_decode_error,
                prefetch_count=consumer.initial_prefetch_count,
            )
            self.consumers.append(beside)
        # What waits there comes at once, and the pool takes nothing before the loop runs.
        consumer.call_soon(self._consume)
        if self.private:
            self.renewing = consumer.timer.call_repeatedly(
                EXPIRES / RENEWALS, consumer.call_soon, (self._renew,)
            )

    def _consume(self) -> None:
        for beside in self.consumers:
            beside.consume()

    def _renew(self) -> None:
        """Say that this worker is still there, to brokers that do not see it by themselves."""
        for beside in self.consumers[len(self.queues) :]:
            beside.declare()

    def stop(self, consumer: Any) -> None:
        if self.renewing is not None:
            self.renewing.cancel()
        for beside in self.consumers:
            ignore_errors(consumer, beside.cancel)
        self.consumers = []

    def _addressing(
        self, queue: str, subscription: Subscription | None, handle: Callable[[Any], Any]
    ) -> Callable[[Any], Any]:
        """*handle*; for a *subscription* behind what makes events calls of its own task."""
        if subscription is None:
            return handle

        def handle_addressed(message: Any) -> Any:
            self.subscriptions.address(message, subscription, queue)
            return handle(message)

        return handle_addressed


def _own(app: Any) -> Iterator[tuple[Queue, None]]:
    """Those of repairs and replies that no option and no setting gives to the worker already."""
    queues, eda = app.amqp.queues, app.eda
    if queues._consume_from is not None:
        return
    for name in sorted({*eda.repair_tasks.queues, *filter(None, [eda.requests.address])}):
        if name not in queues:
            queue = queues[name]
            del queues[name]  # what is in there is taken together with the tasks
            yield queue, None


def _subscribed(app: Any) -> Iterator[tuple[Queue, Subscription]]:
    """Those of the app's subscriptions; with ``-Q`` only the ones that it names."""
    queues, subscriptions = app.amqp.queues, app.eda.subscriptions
    chosen = queues._consume_from
    for name, subscription in sorted(subscriptions.by_queue.items()):
        if chosen is None or chosen.pop(name, None) is not None:
            queues.pop(name, None)  # which Celery has made of the option
            yield app.eda.event_queues.queue_of(subscription), subscription


def _private(app: Any, worker: str) -> Iterator[tuple[Queue, Subscription]]:
    """Those that every worker has of its own, whatever ``-Q`` says."""
    for subscription in app.eda.subscriptions.per_worker.values():
        yield app.eda.event_queues.queue_for(subscription, worker), subscription
