"""The messages of a Session's transaction, given to its connection when that commits.

Until then they stay in memory: one INSERT for all, and none for a savepoint that is rolled back.
"""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary, WeakSet, ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, SessionTransaction, SessionTransactionOrigin

from celery_eda import joined_connection
from celery_eda.errors import TwoEngines
from celery_eda.joined_connection import JoinedConnection
from celery_eda.message import Message
from celery_eda.transaction import Store, Transaction

log = logging.getLogger(__name__)

Bind = Engine | Connection

_joined: WeakKeyDictionary[Session, JoinedSession] = WeakKeyDictionary()
# The connections of each open transaction, also of those that are not joined yet.
_used: WeakKeyDictionary[Session, WeakSet[Connection]] = WeakKeyDictionary()
_EXPLICIT = (SessionTransactionOrigin.BEGIN, SessionTransactionOrigin.BEGIN_NESTED)


def find(session: Session) -> JoinedSession | None:
    """What was published in the transaction of *session*; None if it is not joined."""
    return _joined.get(session)


def join(session: Session, store: Store, bind: Bind | None = None) -> JoinedSession:
    """The one transaction of *session*, made if it has none yet."""
    if (joined := find(session)) is None:
        joined = JoinedSession(session, store, bind)
    return joined


class JoinedSession(Transaction):
    """What was published in a Session's transaction.

    Attributes:
        committing: whether a commit is under way, for which its connection has to be known.
        over: whether it has committed, so that a publish is outside of it.
        rolled_back: whether somebody asked for its end.
    """

    def __init__(self, session: Session, store: Store, bind: Bind | None = None) -> None:
        super().__init__(store)
        self._session = ref(session)
        self._bind = bind
        self._carrier: JoinedConnection | None = None
        # How much was captured when each open savepoint began.
        self._marks: dict[SessionTransaction, int] = {}
        self.committing = self.over = self.rolled_back = False
        _joined[session] = self

    @property
    def session(self) -> Session:
        session = self._session()
        assert session is not None, "whoever publishes in it holds it"
        return session

    def capture(self, message: Message) -> None:
        """Keep *message*. Publishing counts as the first statement of a transaction.

        Otherwise a rollback would leave the message: with nothing begun, it tells nobody.
        """
        self.begin()
        super().capture(message)
        if self.committing:
            self.enrol()

    def begin(self) -> None:
        """Begin a transaction unless one is open; the database is not asked yet."""
        if not self.session.in_transaction():
            self.session.begin()

    def enrol(self) -> None:
        """Have the outbox's connection take part in the commit and the messages along.

        Raises:
            TwoEngines: it would not be the only one.
        """
        chosen = {"bind": self._bind} if self._bind is not None else None
        connection = self.session.connection(bind_arguments=chosen)
        if self._carrier is None:
            self._carrier = joined_connection.join(connection, self.store)
            self._carrier.contributors.append(self)
        self.refuse_two_engines()

    def refuse_two_engines(self) -> None:
        """See to it that the messages commit together with the work.

        Raises:
            TwoEngines: they would not.
        """
        if self._carrier and len(_used[self.session]) > 1 and not self.session.twophase:
            raise TwoEngines(
                "This session's transaction uses more than one engine. They commit one after the "
                "other, so a message could leave although the work was lost. Publish in a "
                "transaction that uses one engine only, or make the session with twophase=True."
            )

    # ── the session's transaction ───────────────────────────────────────────────────────────

    def roll_back(self) -> None:
        """The transaction, or its innermost savepoint, is rolled back; its end follows."""
        self.committing = False
        self.rolled_back = not self.session.in_nested_transaction()

    def end(self) -> None:
        """The transaction is over, one way or the other."""
        carrier, self._carrier = self._carrier, None
        if carrier:
            carrier.contributors.remove(self)
        if self.over:
            self.finish(carrier)
        else:
            self.drop()
        self.committing = self.over = self.rolled_back = False

    def finish(self, carrier: JoinedConnection | None) -> None:
        """It committed: give away what no connection's commit has taken along."""
        if carrier and carrier.is_open:
            carrier.take(self)  # the session took part in a Connection's transaction
        elif self.captured:
            self.store_apart()

    def drop(self) -> None:
        """It did not commit: drop its messages, and say so unless somebody asked for it."""
        if self.captured and not self.rolled_back:
            log.error(
                "a session was closed without a commit; not sent: %s",
                ", ".join(message.task for message in self.captured),
            )
        self.forget()

    def store_apart(self) -> None:
        """Store the messages in a short transaction of their own."""
        self.store.add_apart(tuple(self.captured))
        self.captured.clear()

    # ── its savepoints ──────────────────────────────────────────────────────────────────────

    def set_savepoint(self, savepoint: SessionTransaction) -> None:
        """From here on messages belong to *savepoint*."""
        self._marks[savepoint] = len(self.captured)

    def release(self, savepoint: SessionTransaction) -> None:
        """The messages of *savepoint* belong to what is around it."""
        self._marks[savepoint] = len(self.captured)
        self.committing = False

    def end_savepoint(self, savepoint: SessionTransaction) -> None:
        """Drop the messages of *savepoint* unless it was released."""
        del self.captured[self._marks.pop(savepoint, 0) :]


@event.listens_for(Session, "after_transaction_create")
def _begin(session: Session, transaction: SessionTransaction) -> None:
    joined = find(session)
    if joined and transaction.nested:
        joined.set_savepoint(transaction)
    elif not joined and _is_lent(session) and transaction.origin in _EXPLICIT:
        # What is published in this block through the joined connection has to come after the
        # savepoint, which the session would only set with its first statement.
        session.connection()


def _is_lent(session: Session) -> bool:
    """Whether *session* works on a connection that is joined itself."""
    return isinstance(session.bind, Connection) and bool(joined_connection.find(session.bind))


@event.listens_for(Session, "after_begin")
def _use(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    _used.setdefault(session, WeakSet()).add(connection)
    if joined := find(session):
        joined.refuse_two_engines()


@event.listens_for(Session, "before_commit")
def _commit(session: Session) -> None:
    if joined := find(session):
        joined.committing = True
        if joined.captured:
            joined.enrol()


@event.listens_for(Session, "after_commit", insert=True)
def _succeed(session: Session) -> None:
    if joined := find(session):
        if savepoint := session.get_nested_transaction():
            joined.release(savepoint)
        else:
            joined.over = True


@event.listens_for(Session, "after_rollback")
def _roll_back(session: Session) -> None:
    if joined := find(session):
        joined.roll_back()


@event.listens_for(Session, "after_transaction_end")
def _end(session: Session, transaction: SessionTransaction) -> None:
    joined = find(session)
    if joined and transaction.nested:
        joined.end_savepoint(transaction)
    elif transaction.parent is None:
        _used.pop(session, None)
        if joined:
            joined.end()
