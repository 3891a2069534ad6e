"""Joins a transaction that the user opened, so that messages commit or roll back with it.

Each Session and each Connection has one :class:`Transaction`, found from the object itself. The
transaction keeps its messages until its own end, even if the ``with`` block ends earlier.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from celery_eda.core import context
from celery_eda.outbox.transactions import connection as joined_connection
from celery_eda.outbox.transactions import session as joined_session
from celery_eda.outbox.transactions.base import Transaction
from celery_eda.outbox.transactions.connection import JoinedConnection
from celery_eda.outbox.transactions.session import Bind
from celery_eda.outbox.wiring import Outbox

Target = TypeVar("Target")


def join(target: Any, outbox: Outbox, bind: Bind | None = None) -> Transaction:
    """The one transaction of *target*, made if it has none yet.

    Args:
        target: a Session, scoped_session, Connection, AsyncSession or AsyncConnection.
        outbox: of the service, which the messages are written to.
        bind: the engine of the outbox, for a session that has several.

    Raises:
        TypeError: *target* is none of these.
    """
    joined_session.listen()
    match _events_target(target):
        case Session() as session:
            return joined_session.join(session, outbox, bind)
        case Connection() as connection:
            return joined_connection.join(connection, outbox)
    raise TypeError(
        f"{target!r} is neither a session nor an open connection. Pass a Session, scoped_session, "
        "Connection, AsyncSession or AsyncConnection."
    )


def _events_target(target: Any) -> Any:
    """The Session or Connection behind a scoped or asynchronous one."""
    # By attribute, because sqlalchemy.ext.asyncio cannot be imported without greenlet.
    if hasattr(target, "registry"):
        target = target()
    target = getattr(target, "sync_session", target)
    return getattr(target, "sync_connection", target)


class scope(Generic[Target]):  # noqa: N801  # used in a with statement, like a function
    """A ``with`` or ``async with`` block whose publishes belong to the target's transaction."""

    def __init__(self, target: Target, outbox: Outbox, bind: Bind | None = None) -> None:
        self._target = target
        self._transaction = join(target, outbox, bind)

    def __enter__(self) -> Target:
        self._scope = context.open_scope(self._transaction)
        return self._target

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._scope.open = False
        if isinstance(self._transaction, JoinedConnection):
            self._transaction.dispatch_if_over()

    async def __aenter__(self) -> Target:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)


@contextmanager
def own_transaction(outbox: Outbox) -> Iterator[Session]:
    """A session that is committed at the end of the block, or rolled back by an exception.

    While a message is handled it is a savepoint of the message's transaction.
    """
    progress = context.in_progress.get()
    if progress is not None and not progress.finished:
        session = Session(progress.connection, join_transaction_mode="create_savepoint")
    else:
        session = Session(outbox.databases.engine)
    with session, scope(session, outbox), session.begin():
        yield session


def outside() -> AbstractContextManager[None]:
    """A block whose messages belong to no transaction, although one is open around it."""
    return context.scope_of(None)


def transaction(outbox: Outbox, target: Any = None) -> AbstractContextManager[Any]:
    """A block whose messages belong to the transaction of *target*, or to one of its own."""
    return own_transaction(outbox) if target is None else scope(target, outbox)
