"""One queue that a worker consumes beside the queues of its tasks.

If the queue cannot be declared or consumed, because its node is down or a permission is missing,
the worker goes on with its tasks, and tries again.
"""

from __future__ import annotations

import logging
from typing import Any

from amqp.exceptions import PreconditionFailed
from kombu import Consumer, Queue
from kombu.common import ignore_errors

log = logging.getLogger(__name__)

#: Seconds until the next attempt to consume a queue that is not available.
RETRY_DELAY = 5.0


class AuxiliaryConsumer:
    """Consumes *queue* in a Celery *worker* (its ``Consumer``), over a channel of its own.

    Args:
        worker: Celery's consumer, which has the connection, the timer and the event loop.
        queue: the queue.
        options: those of kombu's ``Consumer``.
    """

    def __init__(self, worker: Any, queue: Queue, **options: Any) -> None:
        self.queue = queue
        self._worker = worker
        self._options = options
        self._consumer: Consumer | None = None
        self._is_consuming = self._is_stopped = False

    def open(self) -> None:
        """Declare the queue, now or as soon as that is possible.

        Raises:
            Exception: an error of the connection, after which Celery connects again.
        """
        try:
            self._consumer = self._declared()
        except self._worker.channel_errors as error:
            self._try_later(error)

    def consume(self) -> None:
        """Consume the queue as soon as it is declared. Messages may arrive at once."""
        self._is_consuming = True
        if self._consumer is None:
            return
        try:
            self._consumer.consume()
        except self._worker.channel_errors as error:
            self._consumer = None
            self._try_later(error)

    def declare(self) -> None:
        """Declare the queue again, so that the broker does not expire it."""
        if self._consumer is not None:
            self._consumer.declare()

    def stop(self) -> None:
        """Consume no longer."""
        self._is_stopped = True
        if self._consumer is not None:
            ignore_errors(self._worker, self._consumer.cancel)

    def _try_later(self, error: Exception) -> None:
        log.warning(
            "the queue %s is not consumed for now, trying again in %d s: %s",
            self.queue.name,
            RETRY_DELAY,
            error,
        )
        # The timer may be a thread of its own; call_soon runs where messages are received.
        self._worker.timer.call_after(RETRY_DELAY, self._worker.call_soon, (self._reopen,))

    def _reopen(self) -> None:
        if not self._is_stopped:
            self.open()
            if self._is_consuming:
                self.consume()

    def _declared(self) -> Consumer:
        channel = self._worker.connection.channel()
        try:
            return Consumer(channel, queues=[self.queue], **self._options)
        except PreconditionFailed as error:
            log.warning(
                "the queue %s exists with other arguments and is used as it is: %s. To have it "
                "declared anew, stop its consumers and delete it while it is empty.",
                self.queue.name,
                error,
            )
            channel = self._worker.connection.channel()
            return Consumer(channel, queues=[self.queue], auto_declare=False, **self._options)
