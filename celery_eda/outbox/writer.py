"""Writing messages, and the rows that belong to them, in the transaction that captured them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sqlalchemy import Connection, Engine

from celery_eda.brokers import DirectEnqueue
from celery_eda.core import redaction
from celery_eda.core.message import Message
from celery_eda.ordering import Sequences
from celery_eda.outbox.sender import CommitSender
from celery_eda.outbox.store import OutboxStore

log = redaction.logger(__name__)

#: The execution option of connections that celery_eda itself commits.
OWN = "celery_eda_own"
#: The id of a row of the outbox.
RowId = int
#: The name of the queue that a message was put into directly.
QueueName = str
Written = RowId | QueueName


class Companion(Protocol):
    """A wing that writes rows of its own beside the messages of a transaction.

    The durable requests and the event store are written this way.
    """

    def record(self, connection: Connection, messages: Sequence[Message]) -> None:
        """Write its rows for *messages*, through the connection of their transaction."""
        ...


class Writer:
    """Writes captured messages, and dispatches them after the commit.

    Args:
        engine: for messages published outside any transaction.
        sequences: number the messages that have an ordering key.
        companions: wings that write beside the messages, in this order.
        direct: puts messages into queues of this database; None if the broker is another server.
        store: the outbox.
        sender: sends after the commit; None to leave all messages to the relays.
    """

    def __init__(
        self,
        engine: Engine,
        sequences: Sequences,
        companions: Sequence[Companion],
        direct: DirectEnqueue | None,
        store: OutboxStore,
        sender: CommitSender | None,
    ) -> None:
        self._engine = engine
        self._sequences = sequences
        self._companions = companions
        self._direct = direct
        self._store = store
        self._sender = sender

    def write(self, connection: Connection, messages: Sequence[Message]) -> list[Written]:
        """Write *messages* through *connection*, each behind those before it with the same key.

        Returns:
            The outbox ids of messages that have to be sent, and the names of the queues that the
            others were put into.
        """
        numbered = self._sequences.number(connection, messages)
        for companion in self._companions:
            companion.record(connection, numbered)
        queues: list[QueueName] = []
        left: Sequence[Message] = numbered
        if self._direct:
            queues, left = self._direct.put(connection, left)
        ids = self._store.add(connection, left) if left else []
        return [*ids, *queues]

    def dispatch(self, written: Sequence[Written]) -> None:
        """Send what :meth:`write` has written, now that its transaction is over.

        Returns at once. A transaction that did not commit left no rows, so nothing is sent. Raises
        nothing: the caller would take a transaction that has committed for one that has failed.
        """
        ids = [each for each in written if isinstance(each, RowId)]
        try:
            if self._direct and len(ids) < len(written):
                self._direct.wake_all()
            if ids and self._sender:
                self._sender.send(ids)
        except Exception:
            log.exception("messages just committed are left to the relays and workers")

    def write_now(self, messages: Sequence[Message]) -> None:
        """Write *messages* in a short transaction of their own, and dispatch them."""
        with self._engine.begin() as connection:
            connection.execution_options(**{OWN: True})
            written = self.write(connection, messages)
        self.dispatch(written)
