"""The current transaction, which captures published messages, and the message in progress.

The context variables only say which ones are current. Captured messages live in the transaction
itself, because a session may be closed in another context than it was opened in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from celery import Task
from sqlalchemy import Connection, RootTransaction
from sqlalchemy.orm import Session

from celery_eda.errors import NoDelivery, TwoSessions

if TYPE_CHECKING:
    from celery_eda.core.delivery import Delivery
    from celery_eda.core.event import Event
    from celery_eda.core.identity import Identity
    from celery_eda.core.message import Message
    from celery_eda.core.service import Service


log = logging.getLogger(__name__)


class Stage(IntEnum):
    """States of a transaction."""

    over = 0
    begun = 1
    written = 2


class Capture:
    """A transaction that captures the messages published in it.

    Attributes:
        over: True once it has committed; messages published later do not belong to it.
        scopes: the code that publishes into it.
        service: the service whose outbox gets the messages, if that is decided.
    """

    over = False
    scopes: tuple[Scope, ...] = ()
    service: Service | None = None

    @property
    def stage(self) -> Stage:
        """The state of the transaction; ``over`` between two transactions of a session."""
        return Stage.begun

    @property
    def connection(self) -> Connection:
        """The connection through which the transaction writes."""
        raise NotImplementedError

    def capture(self, message: Message) -> None:
        """Capture *message*, to be written when the transaction commits."""
        raise NotImplementedError

    def holds(self, message: Identity | str) -> bool:
        """True if a message captured here still waits for the commit.

        Args:
            message: its identity, or Celery's id of the call.
        """
        return False


class Collected(Capture):
    """Messages published outside a transaction, for a caller that will write them."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def capture(self, message: Message) -> None:
        self.messages.append(message)


def running_task() -> asyncio.Task[Any] | None:
    """The current asyncio task; None outside an event loop."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


@dataclass(eq=False)
class Scope:
    """The code between two points, whose messages belong to one transaction, or to none.

    Child tasks inherit context variables, but not a transaction: only the asyncio task that opened
    the scope, or a thread that runs on its behalf, publishes into it. An *inherited* scope covers
    child tasks too; a message has one, since its handler's event loop ends before its transaction.
    A scope of a *publisher* covers what Celery publishes for this Celery task, not the functions
    that it calls meanwhile.
    """

    transaction: Capture | None
    attached: bool = False
    inherited: bool = False
    publisher: Task | None = None
    open: bool = True
    owners: list[asyncio.Task[Any] | None] = field(default_factory=lambda: [running_task()])

    def covers(self) -> bool:
        """True if a message published right here belongs to this scope."""
        if not self.open or not (
            self.inherited or (task := running_task()) is None or task in self.owners
        ):
            return False
        return self.publisher is None or self.publisher.app.current_task is self.publisher


_scopes: ContextVar[tuple[Scope, ...]] = ContextVar("celery_eda_scopes", default=())


def open_scope(
    transaction: Capture | None,
    *,
    attached: bool = False,
    inherited: bool = False,
    publisher: Task | None = None,
) -> Scope:
    """Capture what is published from here on in *transaction*, until the scope is closed.

    Three callers open scopes: ``eda.transaction`` for its block, ``eda.attach`` for a session while
    it is in a transaction, and the unit of work for the message that a worker handles. Without a
    transaction nothing is captured, although scopes around this one are open.

    The scope is closed by its attribute ``open``, not by a reset of the variable: ``AsyncSession``
    closes in another asyncio task, where a reset would fail.
    """
    scope = Scope(transaction, attached, inherited, publisher)
    if transaction is not None:
        transaction.scopes = (*(each for each in transaction.scopes if each.open), scope)
    _scopes.set((*(each for each in _scopes.get() if each.open), scope))
    return scope


def resume(transaction: Capture) -> None:
    """Let the scope of *transaction* cover this code too, since it uses the same session.

    FastAPI calls a ``def`` dependency in a copy of the context: the scope that opens there is not
    visible where the session is used.
    """
    if not (opened := [each for each in transaction.scopes if each.open]):
        return
    scope = opened[-1]
    if (task := running_task()) not in scope.owners:
        scope.owners.append(task)
    if scope in _scopes.get():
        return
    _scopes.set((*(each for each in _scopes.get() if each.open), scope))
    if (task_name := published_outside.get()) is not None:
        log.warning(
            "%s was published before the session in use was used here, so it is not part of the "
            "session's transaction. A `def` dependency of FastAPI runs in a context of its own: "
            "use an `async def` dependency, or publish after the first use of the session.",
            task_name,
        )


#: The task that was published last outside any transaction, in this context.
published_outside: ContextVar[str | None] = ContextVar("celery_eda_outside", default=None)


@contextmanager
def scope_of(
    transaction: Capture | None, *, inherited: bool = False, publisher: Task | None = None
) -> Iterator[None]:
    """Capture what is published inside the block in *transaction*; without one, nothing."""
    scope = open_scope(transaction, inherited=inherited, publisher=publisher)
    try:
        yield
    finally:
        scope.open = False


@contextmanager
def apart_from_sessions(publisher: Task | None) -> Iterator[None]:
    """A block in which Celery publishes what follows the task *publisher*.

    Those messages belong to the transaction of the message in progress, or to none. They share no
    fate with a session or a savepoint of the user: a retry must leave although the exception that
    causes it rolls them back.
    """
    progress = in_progress.get()
    kept = progress.kept if progress and not progress.finished else None
    with scope_of(kept, publisher=publisher):
        yield


def _scopes_here() -> list[Scope]:
    """The open scopes that cover this code, the innermost last."""
    return [
        scope
        for scope in _scopes.get()
        if scope.covers() and (scope.transaction is None or not scope.transaction.over)
    ]


def is_outside_on_purpose() -> bool:
    """True if the code said that its messages belong to no transaction."""
    here = _scopes_here()
    return bool(here) and here[-1].transaction is None


def current_transaction() -> Capture | None:
    """The transaction of a message published right here: the innermost one that is open.

    Raises:
        TwoSessions: two attached sessions are open beside each other.
    """
    here = _scopes_here()
    if not here:
        return None
    attached = list(takewhile(lambda scope: scope.attached, reversed(here)))
    if len(attached) > 1:
        return _furthest([scope.transaction for scope in attached if scope.transaction])
    return here[-1].transaction


def _furthest(sessions: list[Capture]) -> Capture:
    """The transaction that a message belongs to, of attached sessions open beside each other.

    A message shares the fate of writes, so it belongs to the only one that has written. One whose
    session is used belongs rather to that than to a session between two transactions.

    Raises:
        TwoSessions: two have come equally far.
    """
    furthest = max(each.stage for each in sessions)
    first, *more = [each for each in sessions if each.stage is furthest]
    if more and furthest is not Stage.over:
        raise TwoSessions(
            "Two attached sessions are open, so it is unclear which one this message belongs to. "
            "Say which: `with eda.transaction(session): …`. A message after the first write of "
            "one of them belongs to that one."
        )
    return first


def holds(message: Identity | str, transaction: Capture | None = None) -> bool:
    """True if *message* waits for the commit of *transaction*, or of one that is open here.

    It is named by its identity, or by Celery's id of the call.
    """
    here = [scope.transaction for scope in _scopes.get() if scope.covers()]
    return any(each.holds(message) for each in (transaction, *here) if each)


@dataclass(eq=False)
class InProgress:
    """The message that this worker slot is handling, with the transaction that commits its effects.

    Attributes:
        session: a session on its connection, once the handler has asked for one.
        next_attempt: the retry that the handler has published, if any. It is kept apart from
            the transaction, because a retry raised inside a savepoint has to leave although the
            savepoint is rolled back.
        replier: the last message captured whose handling will send the reply, in place of this
            one: a replacement of the task, say.
        kept: messages for the end of the transaction, which no savepoint undoes.
        in_handler: True while the handler runs, and after it has failed.
        finished: True once the transaction is over. What Celery publishes after that, such as a
            chord's body, is published once more with the next copy.
    """

    delivery: Delivery
    transaction: RootTransaction
    session: Session | None = None
    next_attempt: Message | None = None
    replier: Message | None = None
    kept: Collected = field(default_factory=Collected)
    in_handler: bool = False
    finished: bool = False

    @property
    def connection(self) -> Connection:
        return self.transaction.connection

    def open_session(self) -> Session:
        """The session on its connection; made by the first call."""
        if self.session is None:
            self.session = Session(self.connection, join_transaction_mode="rollback_only")
        return self.session

    def observe(self, captured: Message, *, replies: bool) -> None:
        """Remember a message that the handler has published, if it continues this one.

        Args:
            captured: as it will be committed.
            replies: True if its handling will send the reply.
        """
        if captured.identity == self.delivery.identity.next:
            self.next_attempt = captured
        if replies:
            self.replier = captured


#: All messages in progress in this process.
running: list[InProgress] = []
in_progress: ContextVar[InProgress | None] = ContextVar("celery_eda_in_progress", default=None)


def abandon() -> None:
    """End the scope of the message in progress, wherever an exception has interrupted it."""
    for scope in _scopes.get():
        scope.open = scope.open and not scope.inherited
    if progress := in_progress.get():
        progress.finished = True


@dataclass(eq=False)
class Tracing:
    """A call of a reliable task that Celery makes in a worker.

    Attributes:
        redelivered: True if an earlier delivery of the message had no outcome.
        recorded: True once the end of the delivery is recorded, so that Celery may report it.
    """

    task_id: str
    redelivered: bool = False
    recorded: bool = False


_tracing: ContextVar[Tracing | None] = ContextVar("celery_eda_tracing", default=None)


@contextmanager
def traced(tracing: Tracing) -> Iterator[None]:
    """A block in which Celery makes the call *tracing*."""
    token = _tracing.set(tracing)
    try:
        yield
    finally:
        _tracing.reset(token)


def tracing_of(task_id: str) -> Tracing | None:
    """The call with this id, if Celery is making it here; None if it makes another one, or none."""
    tracing = _tracing.get()
    return tracing if tracing and tracing.task_id == task_id else None


def current_session() -> Session:
    """The session of the message in progress, committed together with its inbox row.

    Raises:
        NoDelivery: no reliable task is running here.
    """
    progress = in_progress.get()
    if progress is None or progress.finished:
        raise NoDelivery(
            "eda.session belongs to the message in progress, and there is none. Outside a "
            "reliable task use `with eda.transaction() as session:`."
        )
    return progress.open_session()


#: The event that a subscription is handling: the cause of events emitted meanwhile.
handled_event: ContextVar[Event | None] = ContextVar("celery_eda_event", default=None)


@contextmanager
def handling(event: Event) -> Iterator[None]:
    """Make *event* the cause of events emitted inside the block."""
    token = handled_event.set(event)
    try:
        yield
    finally:
        handled_event.reset(token)
