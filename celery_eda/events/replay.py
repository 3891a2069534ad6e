"""Replay: events of the store are sent again, to one subscription.

A new subscription gets the events from before its creation; a subscription whose queue was lost
gets the lost events. Each event keeps its identity and its position: the inbox ignores events that
were handled already, and live events of the same key wait for their turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sqlalchemy import Engine

from celery_eda.core.event import Event
from celery_eda.core.identity import REPLAY_HEADER, Identity, Position
from celery_eda.core.message import Message
from celery_eda.errors import InvalidEvent
from celery_eda.events.emitter import Emitter
from celery_eda.events.store import EventFilter, EventStore
from celery_eda.events.subscriptions import PREFIX
from celery_eda.outbox import Writer

#: Events to write to the outbox in one transaction.
AT_ONCE = 500


@dataclass(frozen=True)
class Replay:
    """Replays the events of one service."""

    engine: Engine
    store: EventStore
    emitter: Emitter
    writer: Writer

    def replay(
        self, queue: str, wanted: EventFilter, *, after: int = 0, publish: bool = False
    ) -> Iterator[Event]:
        """Send the *wanted* events, by position, to the subscription with this *queue*.

        A replay can be repeated, and resumed *after* the position of the last event yielded.

        Args:
            queue: the name of a subscription's queue.
            wanted: which events.
            after: a position; only later events are sent.
            publish: True to let the handler publish. Otherwise a handler that publishes fails, and
                the event becomes a dead letter.

        Yields:
            Each event, after the commit that wrote it to the outbox.

        Raises:
            InvalidEvent: *queue* is not the name of a subscription's queue.
        """
        if not queue.startswith(PREFIX):
            raise InvalidEvent(
                f"{queue!r} is not the queue of a subscription; their names begin with {PREFIX!r}. "
                "`celery eda subscriptions list` lists the queues of a service."
            )
        self.store.assign_positions(self.engine)
        while events := self._read(wanted, after):
            messages = [self.message_to(queue, event) for event in events]
            self.writer.write_now(messages if publish else [silent(each) for each in messages])
            yield from events
            after = events[-1].position or after

    def _read(self, wanted: EventFilter, after: int) -> list[Event]:
        with self.engine.connect() as connection:
            return self.store.read(connection, wanted, after=after, limit=AT_ONCE)

    def message_to(self, queue: str, event: Event) -> Message:
        """Return the message that carries *event* to *queue* alone, with its old identity."""
        message = self.emitter.message_of(replace(event, order=None), Identity(event.id))
        message = replace(message, exchange="", routing_key=queue, queue=None)
        return message.at(Position.of_event(event))


def silent(message: Message) -> Message:
    """Return *message*, marked so that its handler cannot publish."""
    return replace(message, headers={**message.headers, REPLAY_HEADER: True})
