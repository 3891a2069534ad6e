"""The messages of a Connection's transaction, written just before it commits.

They are written before each savepoint too, so that the database itself undoes those of a
savepoint. What became of the transaction is told by SQLAlchemy's events; nothing here commits or
rolls back, but for a commit that failed on our side.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Connection, Engine, ExceptionContext, event
from sqlalchemy.pool import Pool

from celery_eda.message import Message
from celery_eda.transaction import Store, Transaction, refuse_autocommit

_joined: WeakKeyDictionary[Connection, JoinedConnection] = WeakKeyDictionary()
_KEY = "celery_eda"


def find(connection: Connection) -> JoinedConnection | None:
    """What was published in the transaction of *connection*; None if it is not joined."""
    return _joined.get(connection)


def join(connection: Connection, store: Store) -> JoinedConnection:
    """The one transaction of *connection*, made if it has none yet."""
    if (joined := find(connection)) is None:
        joined = _joined[connection] = JoinedConnection(connection, store)
    return joined


class JoinedConnection(Transaction):
    """What was published in a Connection's transaction.

    Attributes:
        contributors: transactions that end with this one and have messages to bring.
        ending: whether the commit is under way, so that a message is written at once.
    """

    def __init__(self, connection: Connection, store: Store) -> None:
        super().__init__(store)
        self._connection = ref(connection)
        self.contributors: list[Transaction] = []
        self.ending = False

    @property
    def connection(self) -> Connection:
        connection = self._connection()
        assert connection is not None, "whoever publishes in it holds it"
        return connection

    @property
    def is_open(self) -> bool:
        """Whether the transaction can still commit."""
        connection = self._connection()
        return connection is not None and connection.in_transaction()

    def capture(self, message: Message) -> None:
        """Keep *message*. Publishing counts as the first statement of a transaction.

        Otherwise a commit would skip the message and a rollback would leave it: with nothing
        begun, neither tells anybody.
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
            connection.info[_KEY] = self  # travels to the pool, see _return

    def write_last(self, connection: Connection) -> None:
        """Write everything: the connection commits now."""
        self.ending = True
        for contributor in self.contributors:
            self.take(contributor)
        try:
            self.write(connection)
        except BaseException:
            # SQLAlchemy takes this for a failed COMMIT, after which it sends no ROLLBACK: the
            # work would wait on the connection for its next commit, without its messages.
            connection.connection.rollback()
            raise

    def start(self) -> None:
        """A transaction begins, so the one before is over, even if no event said so."""
        self.hand_off()
        self.forget()

    def forget(self) -> None:
        super().forget()
        self.ending = False

    def hand_off_if_over(self) -> None:
        """Hand off, unless the transaction is open, or broken by a COMMIT that failed."""
        connection = self._connection()
        if connection is None or connection.get_transaction() is None:
            self.hand_off()


@event.listens_for(Engine, "begin")
@event.listens_for(Engine, "begin_twophase")
def _begin(connection: Connection, *_: Any) -> None:
    if joined := find(connection):
        joined.start()


@event.listens_for(Engine, "savepoint")
def _set_savepoint(connection: Connection, *_: Any) -> None:
    if joined := find(connection):
        joined.write(connection)


@event.listens_for(Engine, "commit")
@event.listens_for(Engine, "prepare_twophase")
def _commit(connection: Connection, *_: Any) -> None:
    if joined := find(connection):
        joined.write_last(connection)


@event.listens_for(Engine, "rollback")
@event.listens_for(Engine, "rollback_twophase")
def _roll_back(connection: Connection, *_: Any) -> None:
    if joined := find(connection):
        joined.forget()


@event.listens_for(Engine, "rollback_savepoint")
def _roll_back_to_savepoint(connection: Connection, *_: Any) -> None:
    # Only what is not written yet: whoever looks for the rows that are undone finds none.
    if joined := find(connection):
        joined.captured.clear()


@event.listens_for(Engine, "handle_error")
def _fail(error: ExceptionContext) -> None:
    # A COMMIT that fails is followed by no rollback.
    joined = find(error.connection) if error.connection is not None else None
    if joined and joined.ending:
        joined.forget()


@event.listens_for(Pool, "checkin")
def _return(dbapi_connection: Any, record: Any) -> None:
    # No event follows a COMMIT. The connection's way back to the pool does, if nothing else.
    if joined := record.info.pop(_KEY, None):
        joined.hand_off()
