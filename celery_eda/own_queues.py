"""Where a worker takes repairs and replies to durable requests from, unless ``-Q`` says otherwise.

Each queue has a channel of its own, so that what is prefetched from one keeps nothing back from
the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from celery import bootsteps
from kombu import Queue
from kombu.common import ignore_errors


class OwnQueues(bootsteps.StartStopStep):
    """Consumes them beside the queues of the tasks."""

    requires = ("celery_eda.intake:Intake",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self.queues = list(_own(consumer.app))
        self.consumers: list[Any] = []

    def start(self, consumer: Any) -> None:
        handle = consumer.create_task_handler()
        for queue in self.queues:
            beside = consumer.app.amqp.TaskConsumer(
                consumer.connection.channel(),
                queues=[queue],
                on_message=handle,
                on_decode_error=consumer.on_decode_error,
                prefetch_count=consumer.initial_prefetch_count,
            )
            beside.consume()
            self.consumers.append(beside)

    def stop(self, consumer: Any) -> None:
        for beside in self.consumers:
            ignore_errors(consumer, beside.cancel)
        self.consumers = []


def _own(app: Any) -> Iterator[Queue]:
    """The queues that no option and no setting gives to the worker already."""
    queues, eda = app.amqp.queues, app.eda
    if queues._consume_from is not None:
        return
    for name in sorted({*eda.repair_tasks.queues, *filter(None, [eda.requests.address])}):
        if name not in queues:
            queue = queues[name]
            del queues[name]  # what is in there is taken together with the tasks
            yield queue
