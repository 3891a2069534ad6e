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


class OwnQueues(bootsteps.StartStopStep):
    """Consumes them beside the queues of the tasks."""

    requires = ("celery_eda.intake:Intake",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        app = consumer.app
        self.subscriptions = app.eda.subscriptions
        self.queues = [*_own(app), *_subscribed(app)]
        self.consumers: list[Any] = []

    def start(self, consumer: Any) -> None:
        handle = consumer.create_task_handler()
        for queue in self.queues:
            beside = consumer.app.amqp.TaskConsumer(
                consumer.connection.channel(),
                queues=[queue],
                on_message=self._addressing(queue.name, handle),
                on_decode_error=consumer.on_decode_error,
                prefetch_count=consumer.initial_prefetch_count,
            )
            self.consumers.append(beside)
        # What waits there comes at once, and the pool takes nothing before the loop runs.
        consumer.call_soon(self._consume)

    def _consume(self) -> None:
        for beside in self.consumers:
            beside.consume()

    def stop(self, consumer: Any) -> None:
        for beside in self.consumers:
            ignore_errors(consumer, beside.cancel)
        self.consumers = []

    def _addressing(self, queue: str, handle: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """*handle*; for a subscription's *queue* behind what makes events calls of its own task."""
        if (subscription := self.subscriptions.by_queue.get(queue)) is None:
            return handle

        def handle_addressed(message: Any) -> Any:
            self.subscriptions.address(message, subscription)
            return handle(message)

        return handle_addressed


def _own(app: Any) -> Iterator[Queue]:
    """Those of repairs and replies that no option and no setting gives to the worker already."""
    queues, eda = app.amqp.queues, app.eda
    if queues._consume_from is not None:
        return
    for name in sorted({*eda.repair_tasks.queues, *filter(None, [eda.requests.address])}):
        if name not in queues:
            queue = queues[name]
            del queues[name]  # what is in there is taken together with the tasks
            yield queue


def _subscribed(app: Any) -> Iterator[Queue]:
    """Those of the app's subscriptions; with ``-Q`` only the ones that it names."""
    queues, subscriptions = app.amqp.queues, app.eda.subscriptions
    chosen = queues._consume_from
    for name, subscription in sorted(subscriptions.by_queue.items()):
        if chosen is None or chosen.pop(name, None) is not None:
            queues.pop(name, None)  # which Celery has made of the option
            yield subscriptions.queue_of(subscription)
