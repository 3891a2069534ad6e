"""The one transaction of a message: its inbox row, the handler's rows, and published messages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, event

from celery_eda.core import context
from celery_eda.core.context import InProgress
from celery_eda.core.delivery import Delivery
from celery_eda.databases import Dialect
from celery_eda.errors import BrokenTransaction, StatementTooLarge
from celery_eda.inbox.attempts import Attempts
from celery_eda.inbox.transient import Stalled, Transient, causes_of
from celery_eda.outbox import Outbox, Transaction, join


@dataclass(frozen=True)
class UnitsOfWork:
    """Begins the transactions of messages.

    Attributes:
        outbox: stores the messages that handlers publish.
        timeout: seconds after which the database may end a transaction that is idle.
    """

    engine: Engine
    dialect: Dialect
    attempts: Attempts
    outbox: Outbox
    timeout: float

    @contextmanager
    def begin(self, delivery: Delivery) -> Iterator[UnitOfWork]:
        """Begin a transaction that captures the messages published in it.

        The block commits it by :meth:`UnitOfWork.commit`; else it is rolled back at the end.

        Raises:
            Stalled: the database ended the transaction, because it was idle.
            Transient: the connection to the database broke.
        """
        began = time.monotonic()
        with self.engine.connect() as connection:
            progress = InProgress(delivery, connection.begin())
            context.in_progress.set(progress)
            context.running.append(progress)
            outgoing = join(connection, self.outbox)
            try:
                with context.scope_of(outgoing, inherited=True):
                    yield UnitOfWork(delivery, progress, outgoing, self.dialect, self.attempts)
            except Exception as error:
                causes = list(causes_of(error))
                if not connection.invalidated or isinstance(causes[0], StatementTooLarge):
                    raise
                # Some servers close the connection of an idle transaction without a word.
                overdue = time.monotonic() - began > self.timeout
                if overdue or any(map(self.dialect.ended_idle, causes)):
                    raise Stalled from error
                raise Transient from error
            finally:
                progress.finished = True
                context.running.remove(progress)


@dataclass(frozen=True)
class UnitOfWork:
    """The transaction of one message.

    Attributes:
        outgoing: the messages published in the transaction.
    """

    delivery: Delivery
    progress: InProgress
    outgoing: Transaction
    dialect: Dialect
    attempts: Attempts

    @property
    def connection(self) -> Connection:
        return self.progress.connection

    def flush(self) -> None:
        """Write the pending changes of the handler's session, in the message's transaction.

        Raises:
            BrokenTransaction: the handler's work can no longer commit together with the inbox row.
        """
        progress, consumer = self.progress, self.delivery.consumer
        if self.dialect.is_aborted(self.connection):
            raise BrokenTransaction(
                f"A statement of {consumer} failed and the handler went on, but the database has "
                "aborted the transaction. Put statements that may fail into "
                "`with session.begin_nested():`."
            )
        if progress.session is not None and progress.transaction.is_active:
            progress.session.commit()
        if not progress.transaction.is_active:
            raise BrokenTransaction(
                f"{consumer} rolled back the transaction of its own message, or a failed flush "
                "did. Put statements that may fail into `with session.begin_nested():`."
            )
        for message in progress.kept.messages:
            self.outgoing.capture(message)

    def commit(self) -> None:
        """Commit the outcome, the handler's rows and its messages, all or nothing."""
        if self.delivery.redelivered:
            self.attempts.delete(self.connection, self.delivery.consumer, self.delivery.identity)
        # The listener of the commit would write them too. An error of the outbox, raised before
        # COMMIT is under way, is rolled back and classified like any other.
        self.outgoing.write(self.connection)
        self.progress.finished = True
        self.connection.commit()


@event.listens_for(Engine, "commit")
def _refuse_commit(connection: Connection) -> None:
    progress = context.in_progress.get()
    if progress and progress.connection is connection and not progress.finished:
        # SQLAlchemy treats this like a failed COMMIT, after which it sends no ROLLBACK.
        connection.connection.rollback()
        raise BrokenTransaction(
            "A handler committed the transaction of its own message: if the worker died now, the "
            "rest of the handler would never run. Remove the commit; the transaction is committed "
            "when the handler returns."
        )
