"""Sending events from the store once more, to one subscription.

So a subscription that is new gets what happened before it was there, and one that lost its queue
what it lost. Each event has the identity and the place in order that it had: whoever handled it
takes no effect again, and what comes live meanwhile waits for its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import Engine

from celery_eda.errors import InvalidEvent
from celery_eda.event import Event
from celery_eda.event_store import Choice, EventStore
from celery_eda.identity import REPLAY_HEADER, Identity, Position
from celery_eda.message import Message
from celery_eda.subscriptions import PREFIX

#: Events that go to the outbox in one transaction.
AT_ONCE = 500


@dataclass(frozen=True)
class Replaying:
    """Replays the events of one service.

    Attributes:
        message_of: makes the message of an event.
        send: writes messages to the outbox in a transaction of their own.
    """

    engine: Engine
    store: EventStore
    message_of: Callable[[Event, Identity], Message]
    send: Callable[[Sequence[Message]], None]

    def replay(
        self, queue: str, choice: Choice, *, after: int = 0, publish: bool = False
    ) -> Iterator[Event]:
        """Send the events of *choice*, by their positions, to the subscription with that *queue*.

        Unless it may *publish*, its handler fails when it does, and the event is a dead letter.
        Repeating it is harmless, and so is dying half-way: begin anew, or *after* the position of
        the last one that was given here.

        Returns:
            Each event, once it is in the outbox.

        Raises:
            InvalidEvent: that is no queue of a subscription.
        """
        if not queue.startswith(PREFIX):
            raise InvalidEvent(
                f"{queue!r} is no queue of a subscription: their names begin with {PREFIX!r}. "
                "`eda subscriptions list` tells those of a service."
            )
        self.store.give_positions(self.engine)
        while events := self._read(choice, after):
            messages = [self.addressed(queue, event) for event in events]
            self.send(messages if publish else [silent(each) for each in messages])
            yield from events
            after = events[-1].position or after

    def _read(self, choice: Choice, after: int) -> list[Event]:
        with self.engine.connect() as connection:
            return self.store.read(connection, choice, after=after, limit=AT_ONCE)

    def addressed(self, queue: str, event: Event) -> Message:
        """The message with which *event* comes to that *queue* alone, as the one that it is."""
        message = self.message_of(replace(event, order=None), Identity(event.id))
        message = replace(message, exchange="", routing_key=queue, queue=None)
        return message.at(Position.of_event(event))


def silent(message: Message) -> Message:
    """*message*, whose handler can publish nothing."""
    return replace(message, headers={**message.headers, REPLAY_HEADER: True})
