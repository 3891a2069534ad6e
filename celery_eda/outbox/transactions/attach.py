"""Captures messages in every session of a factory, so that existing code need not change.

Existing code publishes before, between and after its commits, and expects Celery to send. So a
message *shares the fate of writes*: it belongs to the session's current transaction, or to the
first one if the session has had none yet.

1. The transaction commits: the message is written in it.
2. The transaction wrote, or tried to, and does not commit: the message is dropped. An error is
   logged if the session was only closed or garbage-collected.
3. The transaction ends without having written: there is no fate to share, and the message is
   stored in a short transaction of its own. But if the first transaction of a session is rolled
   back, or ended by an exception, the message is dropped.
4. After a commit or a rollback, until the session is used again, there is no transaction. The
   message is stored at once: a daemon may not use its session again before it is told to end.

A session that is made while a message is handled moves its messages to the transaction of that
message. Its own work becomes part of that transaction too, if its engine is on the same database.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import finalize

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker

from celery_eda.core import context
from celery_eda.core.context import Stage
from celery_eda.core.message import Message
from celery_eda.databases import is_same_database
from celery_eda.outbox.transactions import connection as joined_connection
from celery_eda.outbox.transactions import session as joined_session
from celery_eda.outbox.transactions import writes
from celery_eda.outbox.transactions.connection import JoinedConnection
from celery_eda.outbox.transactions.session import JoinedSession
from celery_eda.outbox.wiring import Outbox

# The types of sqlalchemy.ext.asyncio cannot be imported without greenlet.
if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
else:
    AsyncSession = object

log = logging.getLogger(__name__)


def attach(target: Any, outbox: Outbox) -> None:
    """Capture the messages that are published while a session of *target* is open.

    Args:
        target: a sessionmaker, async_sessionmaker or scoped_session on the database that holds
            the outbox. Sessions made before this call are not attached.
        outbox: of the service, which the messages are written to.

    Raises:
        TypeError: *target* is none of these.
    """
    listen()
    match target:
        case sessionmaker():
            target.class_ = _attached(target.class_, outbox)
        case _ if hasattr(getattr(target, "class_", None), "sync_session_class"):
            sync = target.kw.get("sync_session_class") or target.class_.sync_session_class
            target.kw["sync_session_class"] = _attached(sync, outbox)
            if not issubclass(target.class_, AttachedAsyncSession):
                target.class_ = _mixed(AttachedAsyncSession, target.class_)
        case _ if hasattr(target, "session_factory"):
            attach(target.session_factory, outbox)
        case _:
            raise TypeError(
                f"{target!r} makes no sessions. Pass a sessionmaker, async_sessionmaker or "
                "scoped_session."
            )


def _attached(base: type[Session], outbox: Outbox) -> type[Session]:
    if issubclass(base, AttachedSession):
        return base
    return _mixed(AttachedSession, base, _outbox=outbox)


def _mixed(mixin: type[Any], base: type[Any], **attributes: Any) -> type[Any]:
    return type(base.__name__, (mixin, base), attributes)


class AttachedTransaction(JoinedSession):
    """The messages published in an attached session.

    Attributes:
        outer: the transaction of the message that is being handled where the session is used.
        work: what the session's transaction did.
        has_ended: True if the session has committed or rolled back since it was opened.
        failed: True if the session is closed because of an exception.
    """

    def __init__(self, session: Session, outbox: Outbox) -> None:
        super().__init__(session, outbox)
        self.scope: context.Scope | None = None
        self.work = writes.Work()
        self.outer: JoinedConnection | None = None
        self.open()

    def open(self) -> None:
        """Capture publishes from here on, unless they are captured already.

        A session may outlive the message that it was made for, and be used for the next one.
        """
        outer = self._transaction_in_progress()
        if self.scope is not None and self.scope.open and outer is self.outer:
            return
        if self.scope is not None:
            self.scope.open = False
        self.outer = outer
        self.scope = context.open_scope(self, attached=True)
        self.work.end()
        self.has_ended = self.failed = False

    def _transaction_in_progress(self) -> JoinedConnection | None:
        """The transaction of the message that is being handled here; None outside of any."""
        progress = context.in_progress.get()
        if progress is None or progress.finished:
            return None
        return joined_connection.join(progress.connection, self.outbox)

    def close(self) -> None:
        """Settle the messages that no transaction has written: the session is closed or gone."""
        if self.scope is not None:
            self.scope.open = False
        self.end()

    @property
    def stage(self) -> Stage:
        """The stage of the session; ``over`` too while it is being garbage-collected."""
        if (session := self._session()) is None:
            return Stage.over
        if self.work.wrote or _has_changes(session):
            return Stage.written
        return Stage.over if self.has_ended and not session.in_transaction() else Stage.begun

    def capture(self, message: Message) -> None:
        """Buffer *message*; store it at once if the session has no transaction any more."""
        at_once = self.stage is Stage.over
        super().capture(message)
        if at_once:
            self.write_now()

    def begin(self) -> None:
        """Do nothing: existing code may begin after it has published."""

    def enrol(self) -> None:
        if self.outer is None:
            super().enrol()

    def note_pending(self, session: Session) -> None:
        """Count pending changes, which the next flush would write, as written."""
        self.work.wrote = self.work.wrote or _has_changes(session)

    def roll_back(self) -> None:
        super().roll_back()
        self.note_pending(self.session)

    def finish(self, carrier: JoinedConnection | None) -> None:
        super().finish(carrier)
        self.has_ended = True
        self.work.end()

    def abandon(self) -> None:
        """Drop the messages if the session wrote or failed; otherwise store them separately."""
        undone = (self.rolled_back or self.failed) and not self.has_ended
        if self.captured and not self.work.wrote and not undone:
            self.write_now()
        self.has_ended = self.has_ended or self.rolled_back
        self.rolled_back = self.rolled_back or self.failed
        super().abandon()
        self.work.end()

    def write_now(self) -> None:
        """Store the messages separately, unless the session is part of an open transaction."""
        outer, session = self.outer, self._session()
        if session and isinstance(session.bind, Connection):
            outer = joined_connection.join(session.bind, self.outbox)
        if outer and outer.is_open:
            outer.merge(self)
        else:
            super().write_now()


class AttachedSession(Session):
    """A session that captures messages from its creation until it is closed."""

    _outbox: ClassVar[Outbox]
    warned: ClassVar[bool] = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if not isinstance(options.get("bind"), Connection):
            # Only counts while a message is handled, whose transaction it must not end.
            options["join_transaction_mode"] = "create_savepoint"
        super().__init__(*arguments, **options)
        # Held by the session, not by its transaction: a traceback may lead to the session.
        self._handled_before = sys.exc_info()[1]
        self._joined = AttachedTransaction(self, self._outbox)
        finalize(self, self._joined.close)

    def get_bind(self, *arguments: Any, **options: Any) -> Engine | Connection:
        """The connection of the message in progress, if the engine is on the same database."""
        bind = super().get_bind(*arguments, **options)
        if (outer := self._joined.outer) is None or isinstance(bind, Connection):
            return bind
        if is_same_database(bind, outer.connection.engine):
            return outer.connection
        if not type(self).warned:
            type(self).warned = True
            log.warning(
                "%r is another database than that of the message in progress: a session commits "
                "there apart from the message, so its writes may be repeated.",
                bind.url,
            )
        return bind

    def rollback(self) -> None:
        """Roll back, as always; messages from before the first statement are dropped too."""
        if not self.in_transaction():
            self._joined.rolled_back = True
            self._joined.end()
        super().rollback()

    def close(self) -> None:
        self._close(super().close)

    def reset(self) -> None:
        self._close(super().reset)

    def invalidate(self) -> None:
        self._close(super().invalidate)

    def _close(self, close: Callable[[], None]) -> None:
        self.note_failure()
        self._joined.note_pending(self)
        try:
            close()
        finally:
            self._joined.close()

    def note_failure(self) -> None:
        """Remember an exception that was not being handled when the session was made."""
        error = sys.exc_info()[1]
        if error is not None and error is not self._handled_before:
            self._joined.failed = True


class AttachedAsyncSession(AsyncSession):
    """Reports exceptions to its session, which would not see them in its own greenlet."""

    sync_session: AttachedSession

    async def close(self) -> None:
        self.sync_session.note_failure()
        await super().close()

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.sync_session.note_failure()
        await super().__aexit__(kind, error, traceback)


@event.listens_for(AttachedSession, "after_transaction_create")
def on_after_transaction_create(session: AttachedSession, transaction: SessionTransaction) -> None:
    """Capture from here on, since a closed session can be used again."""
    if transaction.parent is None:
        session._joined.open()


@event.listens_for(AttachedSession, "after_begin")
def on_after_begin(
    session: AttachedSession, transaction: SessionTransaction, connection: Connection
) -> None:
    """Watch what the session does on *connection*."""
    if not transaction.nested:
        writes.watch(connection, session._joined.work)


@event.listens_for(AttachedSession, "before_flush")
def on_before_flush(session: AttachedSession, *_: Any) -> None:
    """Note that the session writes."""
    session._joined.work.wrote = True


def _has_changes(session: Session) -> bool:
    """True if the next flush of *session* would write."""
    return bool(session.new or session.dirty or session.deleted)


def listen() -> None:
    """Listen to every session, engine and pool of this process from now on."""
    joined_session.listen()
    writes.listen()
