"""The composition root: one Celery app, tied to one database."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, Literal, TypeVar

from celery import Celery, Signature, Task
from sqlalchemy import Connection, Engine, Table
from sqlalchemy.orm import Session

from celery_eda.app import installation
from celery_eda.app.repairs import RepairDecorator
from celery_eda.brokers import Brokers
from celery_eda.core.addresses import REPLY_TASK
from celery_eda.core.context import current_session
from celery_eda.core.event import Event
from celery_eda.core.service import Service
from celery_eda.core.settings import register
from celery_eda.databases import Databases
from celery_eda.dead_letters import DeadLetters
from celery_eda.events import Apply, Events, Projection, SubscriptionDecorator
from celery_eda.inbox import Inbox, TaskDecorator
from celery_eda.ordering import Ordering
from celery_eda.outbox import Outbox, attach, outside, transaction
from celery_eda.requests import Replies, Reply, Requests
from celery_eda.sagas import WAKEUP_TASK, Saga, Sagas, Steps, saga_decorator

register()
T = TypeVar("T")
S = TypeVar("S")


class EDA:
    """Makes a Celery app reliable.

    Nothing is read from ``app.conf`` before the first use, so the app may be configured later.
    No connection is opened before the first use either.

    Args:
        app: the Celery app, or None to call :meth:`init_app` later.
        engine: an engine on the service's own database, at READ COMMITTED. After a fork, the child
            replaces its connection pool. Relays connect as it does, with its ``creator``,
            ``connect_args`` and listeners. Made from ``eda_database_url`` if None.

    Attributes:
        task: the decorator ``@eda.task`` of reliable tasks.
        on: the decorator ``@eda.on`` of subscriptions to events.
        repairs: the decorator ``@eda.repairs`` of functions that repair failed messages.
    """

    def __init__(self, app: Celery | None = None, *, engine: Engine | None = None) -> None:
        service = self.service = Service()
        self.databases = Databases(service, engine)
        self.brokers = Brokers(service, self.databases)
        self.ordering = Ordering(service, self.databases)
        self.dead_letters = DeadLetters(service, self.databases, self.ordering)
        self.outbox = Outbox(
            service, self.databases, self.brokers, self.ordering, self.dead_letters
        )
        self.requests = Requests(service, self.databases, self.brokers, self.outbox)
        self.inbox = Inbox(
            service, self.databases, self.ordering, self.dead_letters, self.outbox, self.requests
        )
        self.events = Events(
            service, self.databases, self.brokers, self.ordering, self.outbox, self.inbox
        )
        self.sagas = Sagas(service, self.databases, self.outbox, self.requests)
        self.task = TaskDecorator(service)
        self.on = SubscriptionDecorator(service, self.events, self.task)
        self.repairs = RepairDecorator(self.dead_letters, self.outbox, self.task)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Celery) -> None:
        """Extend *app*: its publishing, the boot steps of its workers, and the tasks it names."""
        self.service.app = app
        app.eda = self
        installation.install(app, self.outbox)
        self.task(name=REPLY_TASK)(self.requests.receive_reply)
        self.task(name=WAKEUP_TASK)(self.sagas.receive_wakeup)

    # ── transactions ────────────────────────────────────────────────────────────────────────

    def transaction(self, target: Any = None) -> AbstractContextManager[Any]:
        """A block in which all messages published share the fate of one transaction.

        Args:
            target: a ``Session``, ``scoped_session``, ``Connection``, ``AsyncSession`` (with
                ``async with``) or ``AsyncConnection``, which its owner commits. None opens a
                session, commits it at the end of the block, and rolls it back on an exception;
                inside a reliable task that session is a savepoint of the task's own transaction.

        Returns:
            A context manager that gives the session or connection.
        """
        return transaction(self.outbox, target)

    def outside(self) -> AbstractContextManager[None]:
        """A block whose messages are sent whatever becomes of the transaction around it.

        ``with eda.outside(): alert.delay("payment failed")`` publishes as outside any transaction:
        by default a message of a reliable task is stored in a short transaction of its own, and
        any other is sent at once. With ``eda_outside = "raise"`` nothing is refused here.

        In a reliable task the messages leave once per attempt. On SQLite, which has one writer,
        storing waits in vain for a transaction that has written: publish before the first write
        or after the rollback.
        """
        return outside()

    def attach(self, sessions: Any) -> None:
        """Capture messages in every session of a ``sessionmaker``; code that uses it is unchanged.

        Args:
            sessions: a ``sessionmaker``, ``async_sessionmaker`` or ``scoped_session`` on the
                database that has the tables of this service.
        """
        attach(sessions, self.outbox)

    @property
    def session(self) -> Session:
        """The session of the message in progress, committed together with its inbox row.

        Raises:
            NoDelivery: no reliable task is running here.
        """
        return current_session()

    # ── events ──────────────────────────────────────────────────────────────────────────────

    def emit(
        self,
        name: str,
        data: Any = None,
        *,
        key: Any = None,
        expected_version: int | None = None,
        correlation_id: str | None = None,
    ) -> Event:
        """Emit an event: ``eda.emit("order.placed", {"id": 7}, key=7)``.

        The event is stored, and delivered to every subscription, if and only if the current
        transaction commits. Outside a transaction it gets one of its own, unless ``eda_outside``
        is ``raise``.

        Args:
            name: words separated by dots. The first word is the category of the event.
            data: a JSON value, or an instance of the class registered for the event.
            key: of the entity that the event is about. Events of one category with the same key
                form a stream. Ordered subscriptions get them in the order of their commits.
            expected_version: the version that the stream must have before.
            correlation_id: by default that of the event or task in progress.

        Returns:
            The event. Its version is known once it is stored.

        Raises:
            InvalidEvent: the name or the data cannot be used.
            InvalidKey: the key cannot be used.
            VersionConflict: at the commit, if another transaction appended to the stream first.
            OutsideTransaction: ``eda_outside`` forbids emitting here.
        """
        return self.events.emitter.emit(
            name,
            data,
            key=key,
            expected_version=expected_version,
            correlation_id=correlation_id,
        )

    def event(self, name: str, version: int = 1) -> Callable[[type[T]], type[T]]:
        """``@eda.event("order.placed")``: registers the class of an event's data.

        Args:
            name: of the event.
            version: of the shape of the data; increase it when the shape changes.

        Raises:
            ConfigurationError: the event has a class already, or the class is neither a dataclass
                nor a pydantic model.
        """

        def register(kind: type[T]) -> type[T]:
            self.events.registry.register(name, kind, version)
            return kind

        return register

    def upcaster(
        self, name: str, version: int
    ) -> Callable[[Callable[[dict[str, Any]], dict[str, Any]]], Any]:
        """``@eda.upcaster("order.placed", 1)``: converts data of that version to the next one."""

        def register(upcast: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
            self.events.registry.upcast(name, version, upcast)
            return upcast

        return register

    def fold(
        self,
        stream: str,
        initial: S,
        apply: Callable[[S, Event], S],
        *,
        at: datetime | None = None,
        snapshot: str | None = None,
        session: Session | Connection | None = None,
    ) -> S:
        """The state of a stream of this service: ``eda.fold("order.7", Order(), Order.after)``.

        Args:
            stream: ``<category>.<key>``.
            initial: the state before the first event.
            apply: gives the state after an event, from the state before it.
            at: leaves out events appended later, by the database's clock. A naive datetime is in
                UTC.
            snapshot: a name under which the state is stored from time to time, as JSON, so that
                the next fold with this name begins there. Use another name when *apply* changes.
            session: to read with; by default the session of the message in progress, if there is
                one, else a connection of its own.

        Raises:
            InvalidEvent: *stream* is not ``<category>.<key>``, or its state cannot be stored.
            ArchivedEvents: the first events have left the store.
        """
        return self.events.fold.fold(
            stream, initial, apply, at=at, snapshot=snapshot, session=session
        )

    def projection(
        self, *patterns: str, table: Table, name: str | None = None, **options: Any
    ) -> Callable[[Apply], Projection]:
        """``@eda.projection("order.#", table=orders)``: maintains a table from events.

        The function gets the row with the event's key, as a dictionary or None, and the
        :class:`celery_eda.Event`. It returns the new row, or None for no row. A projection is an
        ordered subscription: each row is the fold of one stream. The function cannot publish, and
        should depend on its arguments only, so that ``eda projections rebuild`` makes the same
        rows from the same events at any time.

        Args:
            patterns: of the events, as in :meth:`on`; each begins with a category.
            table: with a primary key of one column, in the service's own database.
            name: of the task; by default that of the function.
            options: those of ``@eda.task``.

        Returns:
            The projection. Called with a row and an event, it returns the next row.

        Raises:
            ConfigurationError: the table or an option cannot be used.
            InvalidEvent: a pattern is invalid.
        """
        return self.on.projection(*patterns, table=table, name=name, **options)

    # ── requests ────────────────────────────────────────────────────────────────────────────

    def request(
        self,
        call: str | Task | Signature,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        address: Literal["correlation", "temporary", "durable"] | None = None,
        **options: Any,
    ) -> Reply[Any]:
        """Ask a task of any service for a reply; ``quote.ask(sku)`` is short for it.

        The request leaves when the current transaction commits; outside a transaction, at once.
        The reply leaves when the responder's work commits. A responder that fails for good replies
        with its error. A request that never reaches a responder gets no reply.

        Args:
            call: a task, its name, or a signature of it.
            args: positional arguments, in front of those of a signature.
            kwargs: keyword arguments.
            address: of the reply: ``correlation``, the one queue of this process; ``temporary``, a
                queue for this request; ``durable``, this service's database, where :meth:`reply`
                finds it even after a restart, if a worker of this service consumes from its queue
                ``eda.replies.<service>``. By default ``eda_reply_address``.
            options: those of ``apply_async``. With ``expires``, a request that was not started in
                time is not handled any more.

        Raises:
            RequestError: the task cannot reply, or an option would be unsafe.
            OutsideTransaction: ``eda_outside`` forbids publishing here.
        """
        return self.requests.client.ask(call, args, kwargs, address=address, **options)

    def scatter(
        self,
        calls: Iterable[Signature],
        *,
        need: int | None = None,
        address: Literal["correlation", "temporary", "durable"] | None = None,
        **options: Any,
    ) -> Replies[Any]:
        """Request several: ``eda.scatter([north.s(sku), south.s(sku)], need=1).get(timeout=2)``.

        Args:
            calls: signatures of single tasks, which are sent together.
            need: how many replies are enough: 1 for the first, None for all.
            address: as in :meth:`request`.
            options: as in :meth:`request`.

        Raises:
            RequestError: as in :meth:`request`, or *need* cannot be met.
        """
        return self.requests.client.scatter(calls, need=need, address=address, **options)

    def reply(self, correlation_id: str) -> Reply[Any]:
        """The reply to a durable request of this service, made by any process, at any time.

        Its ``get`` and ``done`` raise :class:`celery_eda.errors.UnknownRequest` if there is none.
        """
        return self.requests.client.find(correlation_id)

    def register_error(self, kind: type[Exception], name: str | None = None) -> type[Exception]:
        """Register a class of errors that travel with replies; also usable as a decorator.

        The requester re-creates such an error by calling the class with its ``args``. Both
        services have to register it under the same *name*, by default ``module.Class``. All other
        errors arrive as :class:`celery_eda.errors.RemoteError`.
        """
        self.requests.remote_errors.register(kind, name)
        return kind

    # ── sagas ───────────────────────────────────────────────────────────────────────────────

    def saga(self, name: str, version: int = 1) -> Callable[[Callable[[Steps], Any]], Saga]:
        """``@eda.saga("order")``: a business flow across services, described step by step.

        The function is called once, and describes the flow with the
        :class:`celery_eda.sagas.Steps` that it gets. Each step is a command to a task. The outcome
        of a command advances the saga in this service's database, on any worker that consumes from
        its queue ``eda.replies.<service>``: every worker without ``-Q``. If a step fails, all steps
        before it are compensated, the latest first.

        Args:
            name: of the saga, under which its instances are stored.
            version: of the description; increase it when the description changes. An instance
                keeps its version, so leave the older one in the code while instances run.

        Raises:
            ConfigurationError: the description is inconsistent.
            SagaError: another saga has this name and version.
        """
        return saga_decorator(self.sagas, name, version)

    # ── checks ──────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Refuse to start with settings or tables that would break a guarantee.

        Raises:
            ConfigurationError: a setting is wrong, or the tables do not exist.
        """
        self.inbox.check()
        self.databases.check()
