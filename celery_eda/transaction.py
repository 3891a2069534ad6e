"""What was published in a transaction, kept until just before it commits.

Nothing is sent from here. The messages go to the outbox, or into queues of this database, with
the caller's own commit; what is handed on after it are the ids of outbox rows, so that whoever
sends them finds only what was really committed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import ref

from sqlalchemy import Connection

from celery_eda import checkpoints
from celery_eda.context import Capture
from celery_eda.errors import AutocommitTransaction
from celery_eda.identity import Identity
from celery_eda.message import Message

#: What is known of a message that was written: the id of its row in the outbox, or the name of
#: the queue that it was put into.
Ticket = int | str


@dataclass(frozen=True)
class Store:
    """Where captured messages go.

    Attributes:
        add: writes messages through a connection, returns a ticket for each.
        hand_off: is told the tickets of what may have been committed.
        add_apart: writes messages in a short transaction of its own, and hands them off.
    """

    add: Callable[[Connection, Sequence[Message]], Sequence[Ticket]]
    hand_off: Callable[[list[Ticket]], None]
    add_apart: Callable[[Sequence[Message]], None]


class Transaction(Capture):
    """The messages published in one database transaction.

    Attributes:
        captured: not written yet.
        written: tickets of what is written, but not yet known to be committed.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.captured: list[Message] = []
        self.written: list[Ticket] = []
        self._heir: ref[Transaction] | None = None

    def capture(self, message: Message) -> None:
        self.captured.append(message)
        checkpoints.reach("publish.captured")

    def holds(self, identity: Identity) -> bool:
        heir = self._heir() if self._heir else None
        held = any(each.identity == identity for each in self.captured)
        return held or (heir is not None and heir.holds(identity))

    def write(self, connection: Connection) -> None:
        """Write what was captured, through the transaction's own connection.

        The buffer is emptied only after the INSERT succeeded: if that fails, a second attempt
        to commit fails too instead of committing the work without its messages.

        Raises:
            AutocommitTransaction: there is no transaction to share.
        """
        if not self.captured:
            return
        refuse_autocommit(connection)
        self.written += self.store.add(connection, tuple(self.captured))
        self.captured.clear()
        checkpoints.reach("outbox.written")

    def take(self, other: Transaction) -> None:
        """Let what *other* captured belong to this transaction from now on."""
        self.captured += other.captured
        other._heir = ref(self)
        other.captured.clear()

    def forget(self) -> None:
        """Drop everything: the transaction did not commit."""
        self.captured.clear()
        self.written.clear()

    def hand_off(self) -> None:
        """Tell the sender what was written, now that the transaction is over."""
        ids, self.written = self.written, []
        if ids:
            checkpoints.reach("publish.committed")
            self.store.hand_off(ids)


def refuse_autocommit(connection: Connection) -> None:
    """See to it that *connection* has a transaction to share.

    Raises:
        AutocommitTransaction: it commits every statement by itself.
    """
    pooled = connection.connection
    if pooled.dbapi_connection is None:
        return
    if not connection.dialect.detect_autocommit_setting(pooled.dbapi_connection):
        return
    # An engine that sends BEGIN itself switches its driver to autocommit to be able to.
    if not getattr(pooled.driver_connection, "in_transaction", False):
        raise AutocommitTransaction(
            "This connection commits every statement by itself, so a message cannot share the "
            "fate of your work. Use a connection without isolation_level='AUTOCOMMIT'."
        )
