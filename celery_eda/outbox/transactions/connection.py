"""The messages of a Connection's transaction, written just before it commits.

They are written before each savepoint too, so that a rollback to a savepoint also undoes the
messages that were published after it. SQLAlchemy's events report how the transaction ends; nothing
here commits or rolls back, except after a write of ours that fails during the commit.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Connection, Engine, ExceptionContext, event
from sqlalchemy.pool import Pool

from celery_eda.core.message import Message
from celery_eda.outbox.transactions.base import Transaction, refuse_autocommit
from celery_eda.outbox.wiring import Outbox

_joined: WeakKeyDictionary[Connection, JoinedConnection] = WeakKeyDictionary()
_KEY = "celery_eda"


def find(connection: Connection) -> JoinedConnection | None:
    """The messages of the transaction of *connection*; None if it is not joined."""
    return _joined.get(connection)


def join(connection: Connection, outbox: Outbox) -> JoinedConnection:
    """The one transaction of *connection*, made if it has none yet."""
    if (joined := find(connection)) is None:
        joined = _joined[connection] = JoinedConnection(connection, outbox)
    return joined


class JoinedConnection(Transaction):
    """The messages published in a Connection's transaction.

    Attributes:
        contributors: transactions that end with this one and bring their messages to it.
        ending: True while the commit is under way, when a message is written at once.
    """

    def __init__(self, connection: Connection, outbox: Outbox) -> None:
        super().__init__(outbox)
        self._connection = ref(connection)
        self.contributors: list[Transaction] = []
        self.ending = False

    @property
    def connection(self) -> Connection:
        connection = self._connection()
        assert connection is not None, "the code that publishes holds the connection"
        return connection

    @property
    def is_open(self) -> bool:
        """True if the transaction can still commit."""
        connection = self._connection()
        return connection is not None and connection.in_transaction()

    def capture(self, message: Message) -> None:
        """Buffer *message*. Publishing counts as the first statement of a transaction.

        With no transaction begun, SQLAlchemy would fire no event for a commit, which would skip
        the message, and none for a rollback, which would leave it in the buffer.
        """
        if self.connection.get_transaction() is None:
            self.connection.begin()
        refuse_autocommit(self.connection)
        super().capture(message)
        if self.ending:
            self.write(self.connection)

    def write(self, connection: Connection) -> None:
        super().write(connection)
        if self.written:
            connection.info[_KEY] = self  # travels to the pool, see on_checkin

    def write_last(self, connection: Connection) -> None:
        """Write all messages: the connection commits now."""
        self.ending = True
        for contributor in self.contributors:
            self.merge(contributor)
        try:
            self.write(connection)
        except BaseException:
            # SQLAlchemy treats this like a failed COMMIT, after which it sends no ROLLBACK: the
            # next commit of the connection would commit the work without its messages.
            _roll_back(connection)
            raise

    def start(self) -> None:
        """Begin a transaction. The one before is over, even if no event reported its end."""
        self.dispatch()
        self.drop()

    def drop(self) -> None:
        super().drop()
        self.ending = False

    def dispatch_if_over(self) -> None:
        """Dispatch, unless the transaction is open, or broken by a COMMIT that failed."""
        connection = self._connection()
        if connection is None or connection.get_transaction() is None:
            self.dispatch()


def _roll_back(connection: Connection) -> None:
    """Roll back by the driver, or give the connection up: the error to report came before."""
    if connection.invalidated:
        return
    try:
        connection.connection.rollback()
    except Exception:
        connection.invalidate()


@cache
def listen() -> None:
    """Listen to every engine and every pool of this process from now on."""
    for target, name, listener in LISTENERS:
        event.listen(target, name, listener)


def on_begin(connection: Connection, *_: Any) -> None:
    """Dispatch the messages that the previous transaction has committed."""
    if joined := find(connection):
        joined.start()


def on_savepoint(connection: Connection, *_: Any) -> None:
    """Write the messages from before the savepoint, so that a rollback to it spares them."""
    if joined := find(connection):
        joined.write(connection)


def on_commit(connection: Connection, *_: Any) -> None:
    """Write all messages. SQLAlchemy fires this event before it sends COMMIT."""
    if joined := find(connection):
        joined.write_last(connection)


def on_rollback(connection: Connection, *_: Any) -> None:
    """Drop all messages."""
    if joined := find(connection):
        joined.drop()


def on_rollback_to_savepoint(connection: Connection, *_: Any) -> None:
    """Drop the messages that are not written yet.

    The database undoes the written ones. Their ids stay: the sender looks for those rows and finds
    none.
    """
    if joined := find(connection):
        joined.captured.clear()


def on_error(error: ExceptionContext) -> None:
    """Drop all messages if a COMMIT has failed: SQLAlchemy sends no ROLLBACK after it."""
    joined = find(error.connection) if error.connection is not None else None
    if joined and joined.ending:
        joined.drop()


def on_checkin(dbapi_connection: Any, record: Any) -> None:
    """Dispatch the committed messages.

    SQLAlchemy has no after-commit event for connections. The return to the pool is the first hook
    that always runs after a COMMIT.
    """
    if joined := record.info.pop(_KEY, None):
        joined.dispatch()


#: Event targets, event names and listeners.
LISTENERS: tuple[tuple[Any, str, Any], ...] = (
    (Engine, "begin", on_begin),
    (Engine, "begin_twophase", on_begin),
    (Engine, "savepoint", on_savepoint),
    (Engine, "commit", on_commit),
    (Engine, "prepare_twophase", on_commit),
    (Engine, "rollback", on_rollback),
    (Engine, "rollback_twophase", on_rollback),
    (Engine, "rollback_savepoint", on_rollback_to_savepoint),
    (Engine, "handle_error", on_error),
    (Pool, "checkin", on_checkin),
)
