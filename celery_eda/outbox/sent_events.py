"""Celery's monitoring event ``task-sent``, for messages that the broker has confirmed.

Celery publishes it together with the message, if ``task_send_sent_event`` is on. A captured message
is sent later, or never if its transaction rolls back, so its relay publishes the event.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from celery import Celery

from celery_eda.brokers import PublishResult, Verdict
from celery_eda.core import redaction
from celery_eda.core.addresses import REPLY_TASK
from celery_eda.core.event import EVENT_EXCHANGE
from celery_eda.core.message import Message
from celery_eda.outbox.store import Pending

log = redaction.logger(__name__)

#: Fields of the event, and the headers of the message that they are read from.
FIELDS = {
    "uuid": "id",
    "root_id": "root_id",
    "parent_id": "parent_id",
    "name": "task",
    "args": "argsrepr",
    "kwargs": "kwargsrepr",
    "retries": "retries",
    "eta": "eta",
    "expires": "expires",
}
#: The fields of one event, without those that a dispatcher adds.
SentEvent = dict[str, Any]


class SentEvents:
    """Publishes the events of one relay, over a connection of its own.

    An event that cannot be published is lost, as in Celery.

    Args:
        timeout: seconds in which the broker has to take the connection.
    """

    def __init__(self, app: Celery, timeout: float) -> None:
        self._app = app
        self._timeout = timeout
        self._connection: Any = None
        self._dispatcher: Any = None

    def another(self) -> SentEvents:
        """The same with a connection of its own, for another thread."""
        return SentEvents(self._app, self._timeout)

    def of(self, answered: Sequence[tuple[Pending, PublishResult]]) -> list[SentEvent]:
        """The events of the confirmed calls; read before their rows leave the outbox."""
        if not self._app.conf.task_send_sent_event:
            return []
        calls = [
            each.message
            for each, answer in answered
            if answer.verdict is Verdict.confirmed
            and each.message.task != REPLY_TASK
            and each.message.exchange != EVENT_EXCHANGE
        ]
        events = []
        for each in calls:
            with suppress(LookupError):  # another relay has taken over, and reports it
                events.append(_sent_event(each.whole()))
        return events

    def publish(self, events: Sequence[SentEvent]) -> None:
        """Publish *events*, now that the messages have left the outbox."""
        if not events:
            return
        try:
            dispatcher = self._dispatcher = self._dispatcher or self._connected()
            for each in events:
                dispatcher.send("task-sent", **each)
        except Exception as error:
            log.warning(
                "%d events task-sent are lost, so monitors miss these calls; the messages were "
                "sent: %r",
                len(events),
                error,
            )
            self.close()

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.collect()
        self._connection = self._dispatcher = None

    def _connected(self) -> Any:
        # Without a limit kombu would retry forever.
        connection = self._connection = self._app.connection_for_write()
        connection.ensure_connection(max_retries=0, timeout=self._timeout)
        return self._app.events.Dispatcher(
            connection, channel=connection.channel(), buffer_while_offline=False
        )


def _sent_event(message: Message) -> SentEvent:
    fields = {field: message.headers.get(header) for field, header in FIELDS.items()}
    route = {"exchange": message.exchange, "routing_key": message.routing_key}
    return {**fields, "queue": message.queue or message.routing_key, **route}
