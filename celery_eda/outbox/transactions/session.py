"""The messages of a Session's transaction, moved to its connection when the session commits.

Until then they stay in memory: one INSERT writes all of them, and a savepoint that is rolled back
costs none.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import (
    ORMExecuteState,
    Session,
    SessionTransaction,
    SessionTransactionOrigin,
)

from celery_eda.core import context
from celery_eda.core.message import Message
from celery_eda.databases import is_same_database, known_dialect
from celery_eda.errors import TwoEngines
from celery_eda.outbox.transactions import connection as joined_connection
from celery_eda.outbox.transactions.base import Transaction
from celery_eda.outbox.transactions.connection import JoinedConnection
from celery_eda.outbox.wiring import Outbox

log = logging.getLogger(__name__)

Bind = Engine | Connection

_joined: WeakKeyDictionary[Session, JoinedSession] = WeakKeyDictionary()
# The connections of each open transaction with the changes that they had made before, including
# sessions that are not joined yet.
_used: WeakKeyDictionary[Session, WeakKeyDictionary[Connection, object]] = WeakKeyDictionary()
_EXPLICIT = (SessionTransactionOrigin.BEGIN, SessionTransactionOrigin.BEGIN_NESTED)


def find(session: Session) -> JoinedSession | None:
    """The messages of the transaction of *session*; None if it is not joined."""
    return _joined.get(session)


def join(session: Session, outbox: Outbox, bind: Bind | None = None) -> JoinedSession:
    """The one transaction of *session*, made if it has none yet."""
    if (joined := find(session)) is None:
        joined = JoinedSession(session, outbox, bind)
    return joined


class JoinedSession(Transaction):
    """The messages published in a Session's transaction.

    Attributes:
        committing: True while a commit is under way, which needs the outbox's connection.
        over: True once the transaction has committed: a later publish is outside of it.
        rolled_back: True if the user's code asked for the rollback.
    """

    def __init__(self, session: Session, outbox: Outbox, bind: Bind | None = None) -> None:
        super().__init__(outbox)
        self._session = ref(session)
        self._bind = bind
        self._carrier: JoinedConnection | None = None
        # The number of messages that were captured when each open savepoint began.
        self._marks: dict[SessionTransaction, int] = {}
        self.committing = self.over = self.rolled_back = False
        _joined[session] = self

    @property
    def session(self) -> Session:
        session = self._session()
        assert session is not None, "the code that publishes holds the session"
        return session

    @property
    def connection(self) -> Connection:
        """The session's connection to the database of the outbox; checked out if need be.

        Of several, the one that has written: a session may read from replicas.
        """
        if self._bind is not None:
            return self.session.connection(bind_arguments={"bind": self._bind})
        ours = [each for each in _used.get(self.session, ()) if self._is_ours(each)]
        if len(ours) > 1:
            ours = [each for each in ours if self._has_written(each)]
        return ours[0] if len(ours) == 1 else self.session.connection()

    def _is_ours(self, connection: Connection) -> bool:
        """True if *connection* leads to the database of the outbox."""
        return is_same_database(connection.engine, self.outbox.databases.engine)

    def _has_written(self, connection: Connection) -> bool | None:
        """True if the transaction of *connection* has written; None if nobody can tell."""
        dialect = known_dialect(connection.dialect.name)
        if dialect is None:
            return None
        return dialect.has_written(connection, _used[self.session].get(connection))

    def capture(self, message: Message) -> None:
        """Buffer *message*. Publishing counts as the first statement of a transaction.

        With no transaction begun, SQLAlchemy would fire no event for a rollback, and the message
        would stay in the buffer.
        """
        self.begin()
        super().capture(message)
        if self.committing:
            self.enrol()

    def begin(self) -> None:
        """Begin a transaction unless one is open. No statement goes to the database yet."""
        if not self.session.in_transaction():
            self.session.begin()

    def enrol(self) -> None:
        """Make the outbox's connection part of the commit, and this a contributor to it.

        A session that has no engine for all tables, and has used none, has no work to share a fate
        with: its messages are stored when it has committed.

        Raises:
            TwoEngines: the transaction has written through another engine besides.
        """
        try:
            connection = self.connection
        except UnboundExecutionError:
            return
        if self._carrier is None:
            self._carrier = joined_connection.join(connection, self.outbox)
            self._carrier.contributors.append(self)
        if any(
            each is not connection and self._has_written(each) is not False
            for each in _used[self.session]
        ):
            self._refuse_two_engines()

    def refuse_another_engine(self) -> None:
        """Make sure that no connection joins a commit under way, apart from the messages.

        Raises:
            TwoEngines: the commit includes the messages already.
        """
        if self._carrier and len(_used[self.session]) > 1:
            self._refuse_two_engines()

    def _refuse_two_engines(self) -> None:
        if not self.session.twophase:
            raise TwoEngines(
                "This session's transaction writes through more than one engine. They commit one "
                "after the other, so a message could leave although the work was lost. Publish in "
                "a transaction that writes through one engine only, or make the session with "
                "twophase=True."
            )

    # ── the session's transaction ───────────────────────────────────────────────────────────

    def roll_back(self) -> None:
        """Note that the transaction or its innermost savepoint is rolled back; its end follows."""
        self.committing = False
        self.rolled_back = not self.session.in_nested_transaction()

    def end(self) -> None:
        """Settle the messages: the transaction has committed or was rolled back."""
        carrier, self._carrier = self._carrier, None
        if carrier:
            carrier.contributors.remove(self)
        if self.over:
            self.finish(carrier)
        else:
            self.abandon()
        self.committing = self.over = self.rolled_back = False

    def finish(self, carrier: JoinedConnection | None) -> None:
        """Pass on the messages that no connection's commit has written: the session committed."""
        if carrier and carrier.is_open:
            carrier.merge(self)  # the session took part in a Connection's transaction
        elif self.captured:
            self.write_now()

    def abandon(self) -> None:
        """Drop the messages, and log that unless the user's code asked for the rollback."""
        if self.captured and not self.rolled_back:
            log.error(
                "a session was closed without a commit, so its messages are not sent: %s. "
                "Commit the session, or roll it back if that was meant.",
                ", ".join(message.task for message in self.captured),
            )
        self.drop()

    def write_now(self) -> None:
        """Store the messages in a short transaction of their own."""
        self.outbox.writer.write_now(tuple(self.captured))
        self.captured.clear()

    # ── its savepoints ──────────────────────────────────────────────────────────────────────

    def set_savepoint(self, savepoint: SessionTransaction) -> None:
        """Begin *savepoint*: messages from here on belong to it."""
        self._marks[savepoint] = len(self.captured)

    def release(self, savepoint: SessionTransaction) -> None:
        """Give the messages of *savepoint* to the transaction around it."""
        self._marks[savepoint] = len(self.captured)
        self.committing = False

    def end_savepoint(self, savepoint: SessionTransaction) -> None:
        """Drop the messages of *savepoint* unless it was released."""
        del self.captured[self._marks.pop(savepoint, 0) :]


@cache
def listen() -> None:
    """Listen to every session, engine and pool of this process from now on."""
    joined_connection.listen()
    for name, listener, options in LISTENERS:
        event.listen(Session, name, listener, **options)


def on_after_transaction_create(session: Session, transaction: SessionTransaction) -> None:
    """Mark where a savepoint begins; set the savepoint of a session on a joined connection at once.

    Messages that are published in the block through the joined connection have to come after that
    savepoint, which the session would set only with its first statement.
    """
    joined = find(session)
    if joined and transaction.nested:
        joined.set_savepoint(transaction)
    elif not joined and _is_on_joined_connection(session) and transaction.origin in _EXPLICIT:
        session.connection()


def _is_on_joined_connection(session: Session) -> bool:
    """True if *session* uses a connection that is joined itself."""
    return isinstance(session.bind, Connection) and bool(joined_connection.find(session.bind))


def on_after_begin(
    session: Session, transaction: SessionTransaction, connection: Connection
) -> None:
    """Remember that the transaction uses *connection*, and refuse a second engine."""
    used = _used.setdefault(session, WeakKeyDictionary())
    if connection not in used:
        dialect = known_dialect(connection.dialect.name)
        used[connection] = dialect.changes_before(connection) if dialect else None
    if joined := find(session):
        joined.refuse_another_engine()
        context.resume(joined)


def on_after_attach(session: Session, instance: object) -> None:
    """Publish from here on into the transaction of the session that *instance* is added to."""
    if joined := find(session):
        context.resume(joined)


def on_do_orm_execute(execution: ORMExecuteState) -> None:
    """Publish from here on into the transaction of the session that executes a statement."""
    if joined := find(execution.session):
        context.resume(joined)


def on_before_commit(session: Session) -> None:
    """Make the outbox's connection part of the commit, if there are messages to write."""
    if joined := find(session):
        session.flush()  # now all connections that the work needs are known
        joined.committing = True
        if joined.captured:
            joined.enrol()


def on_after_commit(session: Session) -> None:
    """Note that the savepoint was released, or that the transaction has committed."""
    if joined := find(session):
        if savepoint := session.get_nested_transaction():
            joined.release(savepoint)
        else:
            joined.over = True


def on_after_rollback(session: Session) -> None:
    """Note that the user's code has asked for a rollback."""
    if joined := find(session):
        joined.roll_back()


def on_after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    """Settle the messages of the savepoint or of the whole transaction."""
    joined = find(session)
    if joined and transaction.nested:
        joined.end_savepoint(transaction)
    elif transaction.parent is None:
        _used.pop(session, None)
        if joined:
            joined.end()


#: Event names, listeners and options. `insert` puts a listener before those of the user.
LISTENERS: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    ("after_transaction_create", on_after_transaction_create, {}),
    ("after_begin", on_after_begin, {}),
    ("after_attach", on_after_attach, {}),
    ("do_orm_execute", on_do_orm_execute, {}),
    ("before_commit", on_before_commit, {}),
    ("after_commit", on_after_commit, {"insert": True}),
    ("after_rollback", on_after_rollback, {}),
    ("after_transaction_end", on_after_transaction_end, {}),
)
