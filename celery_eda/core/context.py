"""The current transaction, which captures published messages, and the message in progress.

The context variables only say which ones are current. Captured messages live in the transaction
itself, because a session may be closed in another context than it was opened in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, RootTransaction
from sqlalchemy.orm import Session

from celery_eda.errors import NoDelivery, PublishingForbidden, TwoSessions

if TYPE_CHECKING:
    from celery_eda.core.delivery import Delivery
    from celery_eda.core.event import Event
    from celery_eda.core.identity import Identity
    from celery_eda.core.message import Message


class Capture:
    """A transaction that captures the messages published in it.

    Attributes:
        over: True once it has committed; messages published later do not belong to it.
    """

    over = False

    @property
    def connection(self) -> Connection:
        """The connection through which the transaction writes."""
        raise NotImplementedError

    def capture(self, message: Message) -> None:
        """Capture *message*, to be written when the transaction commits."""
        raise NotImplementedError

    def holds(self, identity: Identity) -> bool:
        """True if a message captured here still waits for the commit."""
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
    """The code between two points, whose messages belong to one transaction.

    Child tasks inherit context variables, but not a transaction: only the asyncio task that opened
    the scope, or a thread that runs on its behalf, publishes into it. An *inherited* scope covers
    child tasks too; a message has one, since its handler's event loop ends before its transaction.
    """

    transaction: Capture
    attached: bool = False
    inherited: bool = False
    open: bool = True
    owner: asyncio.Task[Any] | None = field(default_factory=running_task)

    def covers(self) -> bool:
        """True if a message published right here belongs to this scope."""
        return self.open and (self.inherited or running_task() in (None, self.owner))


_scopes: ContextVar[tuple[Scope, ...]] = ContextVar("celery_eda_scopes", default=())


def open_scope(transaction: Capture, *, attached: bool = False, inherited: bool = False) -> Scope:
    """Capture what is published from here on in *transaction*, until the scope is closed.

    Three callers open scopes: ``eda.transaction`` for its block, ``eda.attach`` for a session while
    it is in a transaction, and the unit of work for the message that a worker handles.

    The scope is closed by its attribute ``open``, not by a reset of the variable: ``AsyncSession``
    closes in another asyncio task, where a reset would fail.
    """
    scope = Scope(transaction, attached, inherited)
    _scopes.set((*(each for each in _scopes.get() if each.open), scope))
    return scope


@contextmanager
def scope_of(transaction: Capture, *, inherited: bool = False) -> Iterator[None]:
    """Capture what is published inside the block in *transaction*."""
    scope = open_scope(transaction, inherited=inherited)
    try:
        yield
    finally:
        scope.open = False


def current_transaction() -> Capture | None:
    """The transaction of a message published right here: the innermost one that is open.

    Raises:
        TwoSessions: two attached sessions are open beside each other.
    """
    here = [scope for scope in _scopes.get() if scope.covers() and not scope.transaction.over]
    if not here:
        return None
    if len(here) > 1 and here[-1].attached and here[-2].attached:
        raise TwoSessions(
            "Two attached sessions are open, so it is unclear which one this message belongs to. "
            "Say which: `with eda.transaction(session): …`."
        )
    return here[-1].transaction


def holds(identity: Identity, transaction: Capture | None) -> bool:
    """True if a message waits for the commit of *transaction*, or of one that is open here."""
    here = [scope.transaction for scope in _scopes.get() if scope.covers()]
    return any(each.holds(identity) for each in (transaction, *here) if each)


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
        in_handler: True while the handler runs, and after it has failed.
        finished: True once the transaction is over. What Celery publishes after that, such as a
            chord's body, is published once more with the next copy.
    """

    delivery: Delivery
    transaction: RootTransaction
    session: Session | None = None
    next_attempt: Message | None = None
    replier: Message | None = None
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


in_progress: ContextVar[InProgress | None] = ContextVar("celery_eda_in_progress", default=None)


def abandon() -> None:
    """End the scope of the message in progress, wherever an exception has interrupted it."""
    for scope in _scopes.get():
        scope.open = scope.open and not scope.inherited
    if progress := in_progress.get():
        progress.finished = True


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


# The reason why nothing may be published right here; None if publishing is allowed.
_silenced_by: ContextVar[str | None] = ContextVar("celery_eda_silenced_by", default=None)


@contextmanager
def silenced(what: str) -> Iterator[None]:
    """Forbid publishing inside the block; *what* is the subject of the error's text."""
    token = _silenced_by.set(what)
    try:
        yield
    finally:
        _silenced_by.reset(token)


def refuse_publishing_if_silenced(name: str) -> None:
    """Check that a call of the task *name* may be published right here.

    Raises:
        PublishingForbidden: the code runs inside a :func:`silenced` block.
    """
    if (what := _silenced_by.get()) is not None:
        raise PublishingForbidden(
            f"{what} publishes {name}, which must not leave: it was published when the event was "
            "new. Publish from a separate subscription. If this is a replay and the message should "
            "be sent once more, redrive the dead letter or replay with --publish."
        )


# The identities of a chord's messages, which have to be the same when a part's copy completes it.
# Celery's backend publishes them itself, through methods that take no options of ours. Every other
# publish gets its identity as the option `eda_identity`.
_identities: ContextVar[Iterator[Identity] | None] = ContextVar(
    "celery_eda_identities", default=None
)


@contextmanager
def identified(identities: Iterator[Identity]) -> Iterator[None]:
    """Give these *identities*, in this order, to the messages that complete a chord."""
    token = _identities.set(identities)
    try:
        yield
    finally:
        _identities.reset(token)


def gives_identities() -> bool:
    """True while a chord is completed, whose messages have identities of their own."""
    return _identities.get() is not None


def next_identity() -> Identity | None:
    """The identity of the next message of a chord that is completed; None elsewhere."""
    identities = _identities.get()
    return next(identities) if identities else None
