"""Messages captured in a transaction, buffered until just before it commits.

Nothing is sent from here. The messages are written to the outbox, or into queues in this database,
by the caller's own commit. The sender is notified after that commit, of the ids of outbox rows
only, so that it finds no message that was not committed. Listeners of SQLAlchemy's events, in
``connection.py`` and ``session.py``, call ``write`` before the commit and ``dispatch`` after it.
"""

from __future__ import annotations

from weakref import ref

from sqlalchemy import Connection

from celery_eda.core import checkpoints
from celery_eda.core.context import Capture
from celery_eda.core.identity import Identity
from celery_eda.core.message import Message
from celery_eda.errors import AutocommitTransaction
from celery_eda.outbox.wiring import Outbox
from celery_eda.outbox.writer import Written


class Transaction(Capture):
    """The messages published in one database transaction.

    Attributes:
        captured: messages that are not written yet.
        written: the places of messages that are written, but may not be committed yet.
    """

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.service = outbox.service
        self.captured: list[Message] = []
        self.written: list[Written] = []
        # Identities and call ids of the written messages.
        self._uncommitted: set[Identity | str] = set()
        self._merged_into: ref[Transaction] | None = None

    def capture(self, message: Message) -> None:
        self.captured.append(message)
        checkpoints.reach("publish.captured")

    def holds(self, message: Identity | str) -> bool:
        if message in self._uncommitted or any(message in _names(each) for each in self.captured):
            return True
        other = self._merged_into() if self._merged_into else None
        return other is not None and other.holds(message)

    def write(self, connection: Connection) -> None:
        """Write the captured messages, through the transaction's own connection.

        The buffer is emptied only after the INSERT has succeeded: if the INSERT fails, a second
        attempt to commit fails too instead of committing the work without its messages.

        Raises:
            AutocommitTransaction: there is no transaction to share.
        """
        if not self.captured:
            return
        refuse_autocommit(connection)
        self.written += self.outbox.writer.write(connection, tuple(self.captured))
        self._uncommitted.update(*map(_names, self.captured))
        self.captured.clear()
        checkpoints.reach("outbox.written")

    def merge(self, other: Transaction) -> None:
        """Move the captured messages of *other* into this transaction."""
        self.captured += other.captured
        other._merged_into = ref(self)
        other.captured.clear()

    def drop(self) -> None:
        """Drop all messages: the transaction did not commit."""
        self.captured.clear()
        self.written.clear()
        self._uncommitted.clear()

    def dispatch(self) -> None:
        """Notify the sender of the written messages, now that the transaction is over."""
        written, self.written = self.written, []
        self._uncommitted.clear()
        if written:
            checkpoints.reach("publish.committed")
            self.outbox.writer.dispatch(written)


def _names(message: Message) -> tuple[Identity | str, ...]:
    """The identity of *message*, and Celery's id of its call."""
    return message.identity, message.headers.get("id") or ""


def refuse_autocommit(connection: Connection) -> None:
    """Make sure that *connection* has a transaction to share.

    Raises:
        AutocommitTransaction: the connection commits every statement by itself.
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
