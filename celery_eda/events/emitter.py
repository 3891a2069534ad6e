"""Emitting an event: stored, and sent to its subscribers, in one transaction.

Celery's own publishing makes the message, which is captured like any other; only the route differs.
The emitter does not know the subscribers, and works without any.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from celery_eda.core import context
from celery_eda.core.event import EVENT_EXCHANGE, EVENT_TASK, Event, EventAppend, ordering_scope
from celery_eda.core.identity import Identity
from celery_eda.core.message import Message
from celery_eda.core.service import Service
from celery_eda.core.topics import checked_name
from celery_eda.errors import InvalidEvent
from celery_eda.events.registry import EventRegistry
from celery_eda.ordering import keys
from celery_eda.outbox import Outbox, stored


@dataclass(frozen=True)
class Emitter:
    """Emits the events of one app.

    Attributes:
        registry: the classes and versions of the events' data.
    """

    service: Service
    outbox: Outbox
    registry: EventRegistry

    def emit(
        self,
        name: str,
        data: Any,
        *,
        key: Any,
        expected_version: int | None,
        correlation_id: str | None,
    ) -> Event:
        """Emit one event; see :meth:`celery_eda.EDA.emit`."""
        checked_name(name)
        if expected_version is not None and key is None:
            raise InvalidEvent(
                f"{name} is emitted without a key, so it has no stream to compare expected_version "
                "with. Give the key too, or leave expected_version out."
            )
        source = self.service.name
        lane = None if key is None else keys.ordering_key(source, ordering_scope(name), key)
        identity = Identity.fresh()
        correlation, causation = self._origin()
        event = Event(
            id=identity.id,
            type=name,
            source=source,
            time=datetime.now(timezone.utc),
            data=self.registry.to_plain(name, data),
            key=None if lane is None else lane.key,
            data_version=self.registry.version_of(name),
            correlation_id=correlation_id or correlation or str(identity.id),
            causation_id=causation,
        )
        with stored(self.outbox, f"The event {name}"):
            message = self.message_of(event, identity)
            append = EventAppend(event, expected_version)
            transaction = context.current_transaction()
            assert transaction is not None, "the publisher has opened one"
            # ``message_of`` has collected the message apart; now it joins the transaction.
            transaction.capture(replace(message, lane=lane, event_append=append))
        return event

    def message_of(self, event: Event, identity: Identity) -> Message:
        """Return the message of *event* to the exchange of events, with this *identity*."""
        collected = context.Collected()
        with context.scope_of(collected):
            self.service.app.send_task(
                EVENT_TASK,
                (event.to_cloud(),),
                task_id=str(event.id),
                exchange=EVENT_EXCHANGE,
                routing_key=event.type,
                serializer="json",
                argsrepr=f"({event.type!r},)",
                ignore_result=True,
                eda_identity=identity,
            )
        message: Message = collected.messages[0]
        # The queue's name lets the relay declare the exchange and the queues of this app's
        # subscriptions before it publishes.
        return replace(message, queue=EVENT_EXCHANGE, prerequisites=())

    def _origin(self) -> tuple[str | None, str | None]:
        """The correlation and causation ids of an event that is emitted here and now."""
        if (handled := context.handled_event.get()) is not None:
            return handled.correlation_id or str(handled.id), str(handled.id)
        task = self.service.app.current_worker_task
        if task is None or context.in_progress.get() is None:
            return None, None
        return task.request.root_id, task.request.id
