"""Replies to durable requests: ordinary messages, recorded in the service's own database."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from celery_eda.core import context, redaction
from celery_eda.errors import Malformed, UnknownRequest
from celery_eda.requests.outcomes import ReplyReader
from celery_eda.requests.store import RequestStore

log = redaction.logger(__name__)


class ReplyListener(Protocol):
    """A wing that makes durable requests of its own."""

    def receive_reply(self, connection: Connection, request: UUID, outcome: Any) -> bool:
        """Record the *outcome* of *request*; return False if another wing made the request."""
        ...


@dataclass(frozen=True)
class DurableReplies:
    """Receives the replies to this service.

    Attributes:
        listeners: asked in this order, before a reply is recorded as one to ``eda.request``.
    """

    reader: ReplyReader
    requests: RequestStore
    listeners: list[ReplyListener] = field(default_factory=list)

    def receive(self, session: Session, correlation_id: str, outcome: Any) -> None:
        """Record a reply, in the transaction of its message.

        A reply that nobody awaits is dropped with a warning, and so is a second one.
        """
        try:
            self.reader.outcome_in([correlation_id, outcome])
            connection, request = session.connection(), UUID(correlation_id)
            for listener in self.listeners:
                if listener.receive_reply(connection, request, outcome):
                    return
            is_first = self.requests.record(connection, request, outcome)
        except (UnknownRequest, ValueError) as error:
            log.warning("a durable reply is dropped: %s", error)
            return
        if not is_first:
            log.warning("a durable reply is dropped, there is one already: %s", correlation_id)


def refuse_other_queue(address: str) -> None:
    """Check that the message in progress came over the queue *address*.

    Other queues of a service take calls of all its tasks, from everybody who may write to them.

    Raises:
        Malformed: it came over another queue.
    """
    progress = context.in_progress.get()
    if progress is None or progress.finished:
        return
    came_over = (progress.delivery.request.delivery_info or {}).get("routing_key")
    if came_over != address:
        raise Malformed(f"a message to {address} came over another queue")
