"""The hall: ties one Celery app to one database; one line per verb."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from functools import wraps
from typing import Any, Literal, TypeVar
from uuid import UUID

from celery import Celery, Signature, Task
from sqlalchemy import Connection, Engine, Table
from sqlalchemy.orm import Session

from celery_eda.core import context, redaction
from celery_eda.core.addresses import REPLY_TASK
from celery_eda.core.event import Event
from celery_eda.core.settings import register
from celery_eda.databases import schema
from celery_eda.errors import NoDelivery, UnknownRequest
from celery_eda.events.decorators import SubscriptionDecorator
from celery_eda.events.projections.projection import Apply, Projection
from celery_eda.inbox.decorator import TaskDecorator
from celery_eda.inbox.task import made_reliable, run_async
from celery_eda.outbox import result_backend
from celery_eda.outbox.capture import amqp
from celery_eda.outbox.transactions import attach, join
from celery_eda.outbox.transactions import session as joined_session
from celery_eda.parts import Parts
from celery_eda.requests.reply import Replies, Reply
from celery_eda.sagas.engine import WAKEUP_TASK
from celery_eda.sagas.saga import Saga, decorator
from celery_eda.sagas.steps import Steps

register()
T = TypeVar("T")
S = TypeVar("S")
log = redaction.logger(__name__)

#: Celery's own tasks that run, or publish, tasks of the user's.
CANVAS_TASKS = frozenset(
    f"celery.{name}" for name in ("accumulate", "chord_unlock", "chunks", "map", "starmap")
)
#: Celery's own loggers that print what handlers raise.
LOGS_OF_ERRORS = ("celery.app.trace", "celery.worker.request")


class EDA(Parts):
    """Makes a Celery app reliable.

    Nothing is read from ``app.conf`` before it is needed, so the app may be configured later,
    and no connection is made before the first use.

    Args:
        app: the Celery app, or None to call :meth:`init_app` later.
        engine: the engine of the service's own database, at READ COMMITTED, to be disposed of
            after a fork by its owner; made from ``eda_database_url`` if None.
    """

    def __init__(self, app: Celery | None = None, *, engine: Engine | None = None) -> None:
        super().__init__(engine)
        self.task = TaskDecorator(self)
        self.on = SubscriptionDecorator(self)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Celery) -> None:
        """Extend *app*: its publishing, its worker's boot steps, and the tasks that are named."""
        self.app = app
        app.eda = self
        app.amqp_cls = amqp.amqp_class(app.amqp_cls)
        app.__dict__.pop("amqp", None)
        amqp.wrap_send_task(app)
        result_backend.defer(app)
        joined_session.listen()
        for name in LOGS_OF_ERRORS:
            redaction.logger(name)
        app.steps["worker"].update(
            ("celery_eda.app.worker:Guard", "celery_eda.outbox.embedded:EmbeddedRelay")
        )
        app.steps["consumer"].update(
            ("celery_eda.inbox.intake:Intake", "celery_eda.app.worker_queues:WorkerQueues")
        )
        app.on_after_finalize.connect(self.make_reliable)
        self.task(name=REPLY_TASK)(self._take_reply)
        self.task(name=WAKEUP_TASK)(self._wake_saga)

    # ── publishing ──────────────────────────────────────────────────────────────────────────

    def transaction(self, target: Any = None) -> AbstractContextManager[Any]:
        """A block in which everything published shares the fate of a transaction.

        Args:
            target: a ``Session``, ``scoped_session``, ``Connection``, ``AsyncSession`` (with
                ``async with``) or ``AsyncConnection``, whose owner commits it. None makes a
                session of its own, which is committed at the end of the block and rolled back
                by an exception; inside a reliable task it is a savepoint of the task's own
                transaction.

        Returns:
            A context manager that gives the session or connection.
        """
        return self._own_transaction() if target is None else join.scope(target, self.store)

    def attach(self, sessions: Any) -> None:
        """Capture in every transaction of a ``sessionmaker``, with no change where it is used.

        Args:
            sessions: a ``sessionmaker``, ``async_sessionmaker`` or ``scoped_session`` on the
                database that has the tables of this service.
        """
        attach.attach(sessions, self.store)

    @property
    def session(self) -> Session:
        """The session of the message in progress, committed together with its inbox row.

        Raises:
            NoDelivery: no reliable task is running here.
        """
        progress = context.in_progress.get()
        if progress is None or progress.finished:
            raise NoDelivery(
                "eda.session belongs to the message in progress, and there is none. Outside a "
                "reliable task use `with eda.transaction() as session:`."
            )
        if progress.session is None:
            progress.session = Session(progress.connection, join_transaction_mode="rollback_only")
        return progress.session

    # ── events ──────────────────────────────────────────────────────────────────────────────────

    def emit(
        self,
        name: str,
        data: Any = None,
        *,
        key: Any = None,
        expected_version: int | None = None,
        correlation_id: str | None = None,
    ) -> Event:
        """Say that something has happened: ``eda.emit("order.placed", {"id": 7}, key=7)``.

        The event is kept in the event store, and comes to every subscription, if and only if the
        transaction commits in which it is emitted. Outside of any it has one of its own, unless
        ``eda_outside`` is ``raise``.

        Args:
            name: words with dots between them; what is before the first is its category.
            data: what JSON can say, or an instance of the class that is registered for it.
            key: of what it is about. Events of a category with the same key are a stream, and
                come to ordered subscriptions in the order of their commits.
            expected_version: the version that the stream has to have before.
            correlation_id: by default that of the event or task in progress.

        Returns:
            The event; its version is known once it is stored.

        Raises:
            InvalidEvent: its name or its data are of no use.
            InvalidKey: the key is.
            VersionConflict: when the transaction commits, if somebody else was quicker.
            OutsideTransaction: ``eda_outside`` forbids it here.
        """
        return self.emitting.emit(
            name,
            data,
            key=key,
            expected_version=expected_version,
            correlation_id=correlation_id,
        )

    def event(self, name: str, version: int = 1) -> Callable[[type[T]], type[T]]:
        """``@eda.event("order.placed")``: lets its data be of a dataclass or pydantic model.

        Args:
            name: of the event.
            version: of the shape of the data, to be counted up when it changes.

        Raises:
            ConfigurationError: it has a class already, or this one is of no use.
        """

        def register(kind: type[T]) -> type[T]:
            self.event_types.register(name, kind, version)
            return kind

        return register

    def upcaster(
        self, name: str, version: int
    ) -> Callable[[Callable[[dict[str, Any]], dict[str, Any]]], Any]:
        """``@eda.upcaster("order.placed", 1)``: makes data of that version into the next one's."""

        def register(upcast: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
            self.event_types.upcast(name, version, upcast)
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
            initial: the state before its first event.
            apply: gives the state after an event, from the one before it.
            at: only with what was appended until then, by the database's clock; without a zone it
                is UTC.
            snapshot: a name under which the state is kept now and then, as JSON, so that the next
                fold with it begins there. Give another one when *apply* changes.
            session: what to read by; by default the session of the message in progress, if there
                is one, else a connection of its own.

        Raises:
            InvalidEvent: that is no stream, or its state cannot be kept.
            ArchivedEvents: its first events have left the store.
        """
        return self.folding.fold(
            *(stream, initial, apply), at=at, snapshot=snapshot, session=session
        )

    def projection(
        self, *patterns: str, table: Table, name: str | None = None, **options: Any
    ) -> Callable[[Apply], Projection]:
        """``@eda.projection("order.#", table=orders)``: keeps a table of what events tell.

        The function gets the row that has the event's key, as a dictionary, or None, and the
        :class:`celery_eda.Event`; it returns the row as it is from then on, or None for no row.
        It is an ordered subscription: each row is the fold of its stream. It can publish nothing,
        and is to look at nothing else, so that ``eda projections rebuild`` makes the same rows of
        the same events, at any time.

        Args:
            patterns: which events, as in :meth:`on`; each begins with a category.
            table: with a primary key of one column, in the service's own database.
            name: of the task; by default that of the function.
            options: those of ``@eda.task``.

        Returns:
            The projection; called with a row and an event it gives the next row.

        Raises:
            ConfigurationError: it cannot be made so.
            InvalidEvent: a pattern is none.
        """
        return self.on.projection(*patterns, table=table, name=name, **options)

    # ── asking ──────────────────────────────────────────────────────────────────────────────

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

        The request leaves when the transaction commits in which it is made, outside of any at
        once. The reply leaves when the responder's work commits. A responder that fails for good
        replies with its error; one that is never reached does not reply.

        Args:
            call: a task, its name, or a signature of it.
            args: what it is called with; in front of those of a signature.
            kwargs: the same by name.
            address: how the reply comes: ``correlation``, over one queue of this process;
                ``temporary``, over a queue of its own; ``durable``, into this service's database,
                where :meth:`reply` finds it after a restart too, if a worker of this service
                takes from its queue ``eda.replies.<service>``. By default
                ``eda_reply_address``.
            options: those of ``apply_async``. With ``expires`` a request that is not begun in
                time is not handled any more.

        Raises:
            RequestError: nobody could reply, or an option would be unsafe.
            OutsideTransaction: ``eda_outside`` forbids it here.
        """
        return self.requesting.ask(call, args, kwargs, address=address, **options)

    def scatter(
        self,
        calls: Iterable[Signature],
        *,
        need: int | None = None,
        address: Literal["correlation", "temporary", "durable"] | None = None,
        **options: Any,
    ) -> Replies[Any]:
        """Ask many: ``eda.scatter([north.s(sku), south.s(sku)], need=1).get(timeout=2)``.

        Args:
            calls: signatures of single tasks, which are sent together.
            need: how many replies are enough: 1 for the first, None for all.
            address: as for :meth:`request`.
            options: likewise.

        Raises:
            RequestError: as :meth:`request`, or *need* cannot be met.
        """
        return self.requesting.scatter(calls, need=need, address=address, **options)

    def reply(self, correlation_id: str) -> Reply[Any]:
        """The reply to a durable request of this service, made by any process, at any time.

        Its ``get`` and ``done`` raise :class:`celery_eda.errors.UnknownRequest` if there is none.
        """
        return self.requesting.find(correlation_id)

    def register_error(self, kind: type[Exception], name: str | None = None) -> type[Exception]:
        """Let errors of this class travel with replies; also as a decorator.

        An error is made anew by calling the class with its ``args``. Both services have to
        register it, under the same *name*, by default ``module.Class``. Others come as
        :class:`celery_eda.errors.RemoteError`.
        """
        self.remote_errors.register(kind, name)
        return kind

    def _take_reply(self, session: Session, correlation_id: str, outcome: Any) -> None:
        """Record the reply to a durable request, in the transaction of its message."""
        try:
            self.reading.outcome_in([correlation_id, outcome])
            request = UUID(correlation_id)
            if self._is_for_saga(session, request, outcome):
                return
            fresh = self.requests.record(session.connection(), request, outcome)
        except (UnknownRequest, ValueError) as error:
            log.warning("a durable reply is dropped: %s", error)
            return
        if not fresh:
            log.warning("a durable reply is dropped, there is one already: %s", correlation_id)

    # ── sagas ───────────────────────────────────────────────────────────────────────────────

    def saga(self, name: str, version: int = 1) -> Callable[[Callable[[Steps], Any]], Saga]:
        """``@eda.saga("order")``: a business flow of several services, described step by step.

        The function is called once, with what it describes the flow by; see
        :class:`celery_eda.sagas.steps.Steps`. Each step is a command to a task, and its outcome
        moves the saga on, in this service's database, on whichever worker takes from its queue
        ``eda.replies.<service>``: every one without ``-Q``. What fails has all that was done before
        undone, the latest first.

        Args:
            name: under which its instances are kept.
            version: to be counted up when the description changes. Instances keep the version they
                began with, so the older one stays in the code for as long as one of them runs.

        Raises:
            ConfigurationError: the description makes no sense.
            SagaError: there is another one of that name and version.
        """
        return decorator(self, name, version)

    def _is_for_saga(self, session: Session, request: UUID, outcome: Any) -> bool:
        """Pass the reply to the saga that sent the request; return False if there is none."""
        if not self.saga_definitions.known:
            return False
        return self.sagas.receive_reply(session.connection(), request, outcome)

    def _wake_saga(self, session: Session, wakeup: str, id: str, record: int) -> None:
        """Wake a saga: a time-out has passed, a lock is granted, or a sub-saga has ended."""
        self.sagas.wake(session.connection(), wakeup, id, record)

    # ── repairing ───────────────────────────────────────────────────────────────────────────

    def repairs(
        self,
        task: Any,
        on: type[Exception] | tuple[type[Exception], ...] = Exception,
        *,
        name: str | None = None,
        queue: str | None = None,
        **options: Any,
    ) -> Callable[[Callable[..., Any]], Any]:
        """``@eda.repairs(charge, on=BadAmount)``: lets a function repair messages of a task.

        When *task* fails for good with such an error, a task of its own, ``<task>.repair``, is
        published in the transaction that writes the dead letter, to the queue
        ``eda_repair_queue``: the worker that failed is not held up. Workers without ``-Q`` take
        from that queue. Both workers have to load the module with the repairer.

        The function gets a :class:`celery_eda.Failure` and returns ``failure.resubmit(…)``,
        ``failure.skip(why)``, ``failure.leave(why)`` or None, which leaves it too. An answer takes
        effect once, together with what the function wrote; an error makes the repair itself a
        dead letter, and leaves the failed one open. After ``eda_max_repairs`` repairs of one
        message it is left to a person.

        Args:
            task: the task or its name. Give the name where the app is configured after its tasks
                are defined.
            on: which errors; the first repairer of the task that takes an error on gets it.
            name: of the repair task, to tell several of one task apart.
            queue: of the repair task, instead of ``eda_repair_queue``.
            options: those of ``@eda.task``.

        Raises:
            ConfigurationError: there is a repairer of that name already.
        """
        repaired = task if isinstance(task, str) else task.name
        repairer = name or f"{repaired}.repair"
        self.repair_tasks.refuse_second(repaired, repairer)

        def decorate(function: Callable[..., Any]) -> Any:
            decide = run_async(self.task.with_session(function))

            @wraps(function, assigned=("__module__", "__doc__"))
            def repair(letter: int) -> str:
                transaction = join.join(self.session.connection(), self.store)
                return self.repairers.attend(transaction, letter, repairer, decide)

            del repair.__wrapped__  # Celery would take the function's parameters for its own
            self.repair_tasks.add(repaired, on, repairer, queue)
            return self.task(name=repairer, **options)(repair)

        return decorate

    # ── rules ───────────────────────────────────────────────────────────────────────────────

    def make_reliable(self, sender: Celery, **_: Any) -> None:
        """Make the tasks that ``eda_tasks`` names reliable, and Celery's own parts of canvas.

        A worker does so once more when it starts, for tasks defined after the app was finalized.
        """
        for name, task in sender._tasks.items():
            if self.is_named(name) or name in CANVAS_TASKS:
                made_reliable(task)

    def check(self) -> None:
        """Refuse to start where the promise could not be kept.

        Raises:
            ConfigurationError: a setting is wrong, or the tables are not there.
        """
        self.retry_policy  # noqa: B018  # reading it imports it
        schema.check(self.engine, self.tables)

    @contextmanager
    def _own_transaction(self) -> Iterator[Session]:
        progress = context.in_progress.get()
        if progress is not None and not progress.finished:
            session = Session(progress.connection, join_transaction_mode="create_savepoint")
        else:
            session = Session(self.engine)
        with session, join.scope(session, self.store), session.begin():
            yield session
