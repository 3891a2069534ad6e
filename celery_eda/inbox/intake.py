"""The inspection of each message that a worker receives, before Celery handles it.

A message that Celery would drop, or that would stop the worker, becomes a dead letter in the
service's own database and is only then acknowledged. While the database is away such messages stay
unacknowledged and are tried again, so there are no more of them than the worker prefetches.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from celery import bootsteps, signals
from celery.exceptions import NotRegistered
from celery.utils.objects import Bunch
from celery.worker import state

from celery_eda.brokers import AuxiliaryConsumer, KeepsMalformed, dead_letter_exchange
from celery_eda.core import compression
from celery_eda.core.error_text import loggable
from celery_eda.core.inspection import inspect
from celery_eda.core.limits import Limits
from celery_eda.core.retry import delays
from celery_eda.core.service import service_of
from celery_eda.databases import Databases
from celery_eda.dead_letters import Reason
from celery_eda.errors import Malformed
from celery_eda.inbox.local_delivery import LocalDelivery
from celery_eda.inbox.refusals import (
    Refusal,
    RefusedMessage,
    given_up,
    in_any_case,
    refused,
    unread,
)
from celery_eda.inbox.wiring import Inbox

log = logging.getLogger(__name__)

#: Seconds between two tries to write dead letters while the database is away: first, longest.
RETRY_DELAYS = (0.5, 10.0)
#: Seconds between two looks for payloads that a channel has set aside.
POLL_INTERVAL = 1.0
#: Most messages given up, or set aside, that are fetched at once.
BATCH_SIZE = 20


class Intake(bootsteps.StartStopStep):
    """Stands between the broker and Celery's consumer."""

    # Starts once there is a channel, and stops before the channel is closed. The handlers are
    # replaced earlier, when the step is made.
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self.service = service_of(consumer.app)
        self.inbox = self.service.wing(Inbox)
        settings = self.service.settings
        self.consumer = consumer
        self.limits = Limits(settings.max_message_bytes, settings.max_nesting, settings.max_items)
        self.dialect = self.service.wing(Databases).dialect
        self.waiting: deque[tuple[Any, RefusedMessage]] = deque()
        self.delays = delays(*RETRY_DELAYS)
        self.polling: Any = None
        self.given_up: AuxiliaryConsumer | None = None
        compression.limit_decompression(settings.max_decompressed_bytes, settings.max_message_bytes)
        self._create_task_handler = consumer.create_task_handler
        consumer.create_task_handler = self.create_task_handler
        consumer.on_decode_error = self.on_decode_error
        consumer.on_invalid_task = self.on_invalid_task
        consumer.on_unknown_message = self.on_unknown_message
        consumer.on_unknown_task = self.on_unknown_task

    def start(self, consumer: Any) -> None:
        self.inbox.local_delivery = LocalDelivery(consumer)
        channel = consumer.task_consumer.channel
        if isinstance(channel, KeepsMalformed):
            self.polling = consumer.timer.call_repeatedly(
                POLL_INTERVAL, consumer.call_soon, (self.dead_letter_unreadable, channel)
            )
        driver_type = consumer.connection.transport.driver_type
        if self.service.settings.delivery_limit and driver_type == "amqp":
            self.given_up = AuxiliaryConsumer(
                consumer,
                dead_letter_exchange.queue_of(self.service.name),
                on_message=self.on_given_up,
                on_decode_error=self.on_given_up,
                prefetch_count=BATCH_SIZE,
            )
            self.given_up.open()
            self.given_up.consume()

    def stop(self, consumer: Any) -> None:
        """Drop the messages not acknowledged yet: the broker redelivers them."""
        self.waiting.clear()
        if self.inbox.local_delivery:
            self.inbox.local_delivery.is_active = False
        if self.polling is not None:
            self.polling.cancel()
        if self.given_up is not None:
            self.given_up.stop()
            self.given_up = None

    # ── what Celery calls ───────────────────────────────────────────────────────────────────

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        """Celery's handler of messages, called only with messages that pass the inspection."""
        handle = self._create_task_handler(*args, **kwargs)

        def handle_if_valid(message: Any) -> None:
            if malformed := inspect(message, self.limits):
                self.refuse(message, Refusal.of(malformed))
                return
            try:
                handle(message)
            except self.consumer.connection_errors:
                raise
            except Exception as error:
                if _is_reserved(message):
                    raise  # the message is in the pool already
                self.on_invalid_task(None, message, error)

        return handle_if_valid

    def on_decode_error(self, message: Any, error: Exception) -> None:
        self.refuse(message, Refusal.of(error))

    def on_invalid_task(self, body: Any, message: Any, error: Exception) -> None:
        # The text of the error may quote the message.
        words = f"Celery cannot make a request of it: {type(error).__name__}"
        self.refuse(message, Refusal(Reason.malformed, Malformed(words)))

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self.refuse(message, Refusal(Reason.malformed, Malformed("not a call of a task")))

    def on_unknown_task(self, body: Any, message: Any, error: Exception) -> None:
        unknown = NotRegistered("this worker has no task of that name")
        self.refuse(message, Refusal(Reason.unknown_task, unknown))

    # ── refusing ────────────────────────────────────────────────────────────────────────────

    def refuse(self, message: Any, refusal: Refusal) -> None:
        """Write the dead letter of *message*, then acknowledge; later, if the database is away."""
        self._enqueue(message, in_any_case(lambda: refused(message, refusal), message))

    def on_given_up(self, message: Any, *_: Any) -> None:
        """Write the dead letter of a *message* that a queue of the broker has given up."""
        self._enqueue(message, in_any_case(lambda: self._given_up(message), message))

    def _given_up(self, message: Any) -> RefusedMessage:
        queue = dead_letter_exchange.queue_in(message.headers)
        if queue:
            for each in self.inbox.readdressers:
                each.readdress(message, queue)
        return given_up(message)

    def _enqueue(self, message: Any, what: RefusedMessage) -> None:
        self.waiting.append((message, what))
        if len(self.waiting) == 1:
            self.try_all()

    def try_all(self) -> None:
        """Try once for each waiting message to write its dead letter; retry the rest later."""
        for _ in range(len(self.waiting)):
            each = self.waiting.popleft()
            try:
                self._dead_letter(*each)
            except Exception as error:
                log.error("a dead letter cannot be written yet: %s", loggable(repr(error)))
                self.waiting.append(each)
                if self.dialect.is_outage(error):
                    break
        if self.waiting:
            # The timer may be a thread of its own; call_soon runs where messages are received.
            call = (self.consumer.call_soon, (self.try_all,))
            self.consumer.timer.call_after(next(self.delays), *call)
        else:
            self.delays = delays(*RETRY_DELAYS)

    def dead_letter_unreadable(self, channel: KeepsMalformed) -> None:
        """Write the dead letters of payloads that *channel* could not read and has set aside."""
        if self.waiting:
            return
        try:
            for payload in channel.malformed(BATCH_SIZE):
                what = unread(payload)
                if self.inbox.refusals.dead_letter(what):
                    _log(what)
                channel.delete_malformed(payload)
        except Exception as error:
            log.warning("malformed payloads cannot be dead-lettered yet: %s", loggable(repr(error)))

    def _dead_letter(self, message: Any, what: RefusedMessage) -> None:
        fresh = self.inbox.refusals.dead_letter(what)
        if fresh:
            _log(what)
        message.ack_log_error(log, self.consumer.connection_errors)
        if fresh:
            self._notify(message, what.refusal)

    def _notify(self, message: Any, refusal: Refusal) -> None:
        """Send the signals and the failure that Celery would send for such a message."""
        if refusal.reason is not Reason.unknown_task:
            signals.task_rejected.send(sender=self.consumer, message=message, exc=refusal.error)
            return
        try:
            self._report_unknown_task(message)
        except Exception as error:
            log.error(
                "the result backend does not know of an unknown task: %s", loggable(repr(error))
            )

    def _report_unknown_task(self, message: Any) -> None:
        task_id, name = message.headers["id"], message.headers["task"]
        error = NotRegistered(name)
        request = Bunch(
            name=name,
            chord=None,
            root_id=message.headers.get("root_id"),
            correlation_id=message.properties.get("correlation_id"),
            reply_to=message.properties.get("reply_to"),
            errbacks=None,
        )
        self.consumer.app.backend.mark_as_failure(task_id, error, request=request)
        if self.consumer.event_dispatcher:
            self.consumer.event_dispatcher.send("task-failed", uuid=task_id, exception=repr(error))
        signals.task_unknown.send(
            sender=self.consumer, message=message, exc=error, name=name, id=task_id
        )


def _is_reserved(message: Any) -> bool:
    """True if Celery has made a request of *message* and passed it to the pool."""
    request = state.requests.get(message.headers.get("id"))
    return request is not None and request.message is message


def _log(what: RefusedMessage) -> None:
    task, refusal = loggable(what.letter.task), what.refusal
    log.error("dead letter: %s %s: %s", task, refusal.reason.value, loggable(str(refusal.error)))
