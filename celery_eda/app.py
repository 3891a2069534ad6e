"""The hall: ties one Celery app to one database; one line per verb."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from functools import cached_property, partial, wraps
from typing import Any

from celery import Celery, Task
from kombu.utils.imports import symbol_by_name
from sqlalchemy import URL, Connection, Engine, create_engine, make_url
from sqlalchemy.orm import Session

from celery_eda import attachment, context, joining, publishing, redaction, results, schema
from celery_eda.attempts import Attempts
from celery_eda.audit import Audit
from celery_eda.consumer import Consumer
from celery_eda.cursors import Cursors
from celery_eda.dead_letters import DeadLetters
from celery_eda.dialects import Dialect, dialect_of
from celery_eda.errors import ConfigurationError, NoDelivery, UnsafeSetting
from celery_eda.failures import Failures
from celery_eda.housekeeping import Housekeeping
from celery_eda.inbox import Inbox
from celery_eda.message import Message
from celery_eda.order import Order
from celery_eda.outbox import Outbox
from celery_eda.patience import Patience
from celery_eda.publishing import Publisher
from celery_eda.recording import message_in_progress
from celery_eda.refusals import Refusals
from celery_eda.relay import Relay
from celery_eda.repair import Repair
from celery_eda.repairers import Repairers
from celery_eda.retry import Policy, checked
from celery_eda.sender import Sender
from celery_eda.sequences import Sequences
from celery_eda.settings import Settings, register
from celery_eda.tables import Tables
from celery_eda.task import ReliableTask, TaskDecorator, finishing, made_reliable
from celery_eda.transaction import Store
from celery_eda.transports import transport_of
from celery_eda.unit_of_work import UnitsOfWork

register()

#: Celery's own tasks that run, or publish, tasks of the user's.
CANVAS_TASKS = frozenset(
    f"celery.{name}" for name in ("accumulate", "chord_unlock", "chunks", "map", "starmap")
)
#: Celery's own loggers that print what handlers raise.
LOGS_OF_ERRORS = ("celery.app.trace", "celery.worker.request")


class EDA:
    """Makes a Celery app reliable.

    Nothing is read from ``app.conf`` before it is needed, so the app may be configured later,
    and no connection is made before the first use.

    Args:
        app: the Celery app, or None to call :meth:`init_app` later.
        engine: the engine of the service's own database, at READ COMMITTED, to be disposed of
            after a fork by its owner; made from ``eda_database_url`` if None.
    """

    app: Celery

    #: Of each task: the errors that a repairer takes on, its name, and its queue if it has one.
    _known_repairers: dict[str, list[tuple[Any, str, str | None]]]

    def __init__(self, app: Celery | None = None, *, engine: Engine | None = None) -> None:
        self._engine = engine
        self._known_repairers = {}
        self.task = TaskDecorator(self)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Celery) -> None:
        """Extend *app*: its publishing, its worker's boot steps, and the tasks that are named."""
        self.app = app
        app.eda = self
        app.amqp_cls = publishing.amqp_class(app.amqp_cls)
        app.__dict__.pop("amqp", None)
        publishing.store_outside(app)
        results.defer(app)
        for name in LOGS_OF_ERRORS:
            redaction.logger(name)
        app.steps["worker"].update(("celery_eda.worker:Guard", "celery_eda.worker:EmbeddedRelay"))
        app.steps["consumer"].add("celery_eda.intake:Intake")
        app.on_after_finalize.connect(self.make_reliable)

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
        return self._own_transaction() if target is None else joining.scope(target, self.store)

    def attach(self, sessions: Any) -> None:
        """Capture in every transaction of a ``sessionmaker``, with no change where it is used.

        Args:
            sessions: a ``sessionmaker``, ``async_sessionmaker`` or ``scoped_session`` on the
                database that has the tables of this service.
        """
        attachment.attach(sessions, self.store)

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
        known = self._known_repairers.setdefault(repaired, [])
        if repairer in (each for _, each, _ in known):
            raise ConfigurationError(
                f"{repaired} has a repairer {repairer} already. Give this one a name of its own: "
                "`@eda.repairs(…, name=…)`."
            )

        def decorate(function: Callable[..., Any]) -> Any:
            decide = finishing(self.task.with_session(function))

            @wraps(function, assigned=("__module__", "__doc__"))
            def repair(letter: int) -> str:
                connection = self.session.connection()
                return self.repairers.attend(connection, letter, repairer, decide)

            del repair.__wrapped__  # Celery would take the function's parameters for its own
            known.append((on, repairer, queue))
            return self.task(name=repairer, **options)(repair)

        return decorate

    @property
    def repair_queues(self) -> set[str]:
        """The queues of all repair tasks."""
        known = [each for repairers in self._known_repairers.values() for each in repairers]
        return {queue or self.settings.repair_queue for _, _, queue in known}

    def _seek_repair(self, task: Task, error: Exception, letter: int) -> None:
        """Publish the repair of a dead letter, if somebody repairs such errors of *task*."""
        for on, name, queue in self._known_repairers.get(task.name, ()):
            if isinstance(error, on):
                where = queue or self.settings.repair_queue
                self.app.tasks[name].apply_async((letter,), queue=where)
                return

    # ── sending ─────────────────────────────────────────────────────────────────────────────

    def relay(self) -> Relay:
        """A relay of its own, with its own connections. For one thread."""
        return Relay(
            self.relay_engine,
            self.outbox,
            self.dead_letters,
            partial(transport_of, self.app, timeout=self.settings.publish_timeout),
            partial(results.prepare, self.app),
            self.settings,
            self.housekeeping.batches,
        )

    # ── the parts, made when first needed ───────────────────────────────────────────────────

    @cached_property
    def settings(self) -> Settings:
        """The app's settings, checked.

        Raises:
            ConfigurationError: one of them is unknown, wrong or unsafe.
        """
        if self.app.conf.task_protocol != 2:
            raise UnsafeSetting(
                "task_protocol must be 2: older messages have no headers, so copies of a message "
                "could not be told apart. Remove the setting."
            )
        return Settings.of(self.app.conf)

    @cached_property
    def tables(self) -> Tables:
        """The tables of this service. Use ``Tables.on(metadata)`` to merge them into yours."""
        return Tables.on(prefix=self.settings.table_prefix, schema=self.settings.schema)

    @cached_property
    def engine(self) -> Engine:
        """The engine of the service's own database, for transactions of producers and handlers."""
        if self._engine is not None:
            return _forkable(self._engine)
        return self._prepared_engine(self.settings.transaction_timeout)

    @cached_property
    def relay_engine(self) -> Engine:
        """The engine of the relays, whose claims end sooner than a handler's transaction."""
        return self._prepared_engine(self.settings.claim_timeout)

    @cached_property
    def url(self) -> URL:
        """Where the service's own database is.

        Raises:
            ConfigurationError: nobody has said so.
        """
        if self._engine:
            return self._engine.url
        if not self.settings.database_url:
            raise ConfigurationError(
                "eda_database_url is not set: the outbox and the inbox live in the service's own "
                "database. Set it to a SQLAlchemy URL, e.g. sqlite:///shop.db."
            )
        return make_url(self.settings.database_url)

    @cached_property
    def dialect(self) -> Dialect:
        """What differs from database to database."""
        return dialect_of(self.url, claim_timeout=self.settings.claim_timeout)

    @cached_property
    def outbox(self) -> Outbox:
        """Messages committed and not sent yet."""
        return Outbox(self.tables.outbox, self.dialect)

    @cached_property
    def dead_letters(self) -> DeadLetters:
        """Messages that could not be sent or handled."""
        return DeadLetters(self.tables.dead_letters, self.dialect)

    @cached_property
    def audit(self) -> Audit:
        """What was done to dead letters."""
        return Audit(self.tables.audit, self.dialect)

    @cached_property
    def repair(self) -> Repair:
        """Redrives, edits, skips and discards dead letters."""
        return Repair(self.dead_letters, self.audit, self.cursors, self.store)

    @cached_property
    def repairers(self) -> Repairers:
        """Lets functions decide about dead letters."""
        return Repairers(self.repair, self.app.tasks.get, self.settings.max_repairs)

    @cached_property
    def sender(self) -> Sender:
        """Sends what this process commits, right after the commit."""
        return Sender(self.relay)

    @cached_property
    def service(self) -> str:
        """The name under which other services know the order of this one's messages.

        Raises:
            ConfigurationError: it has none.
        """
        if not (name := self.settings.service or self.app.main):
            raise ConfigurationError(
                "Messages with an ordering key need the name of the service that publishes them. "
                "Set eda_service, or give the Celery app a name."
            )
        return name

    @cached_property
    def sequences(self) -> Sequences:
        """The numbers given to messages with an ordering key."""
        return Sequences(self.tables.sequences, self.dialect)

    @cached_property
    def cursors(self) -> Cursors:
        """The numbers awaited of each ordering key, and the messages parked."""
        return Cursors(self.tables.cursors, self.tables.parked, self.dialect)

    @cached_property
    def housekeeping(self) -> Housekeeping:
        """What deletes what is old; relays do it beside their sending."""
        return Housekeeping(
            *(self.relay_engine, self.dialect, self.tables),
            *(self.outbox, self.cursors, self.settings),
        )

    @cached_property
    def store(self) -> Store:
        """Where captured messages go."""
        return Store(self._add, self._hand_off, self.store_apart)

    @cached_property
    def publisher(self) -> Publisher:
        """Decides where a message goes."""
        return Publisher(self.settings.outside, self.is_reliable, self.store_apart)

    @cached_property
    def retry_policy(self) -> Policy | None:
        """What decides on further attempts of tasks without a policy of their own.

        Raises:
            ConfigurationError: ``eda_retry_policy`` is no policy.
        """
        if (given := self.settings.retry_policy) is None:
            return None
        try:
            return checked(symbol_by_name(given))
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigurationError(
                f"eda_retry_policy names {given!r}, which cannot be imported: {error}. "
                "Set it to `module:name` of a RetryPolicy or a function."
            ) from error

    @cached_property
    def consumer(self) -> Consumer:
        """Makes deliveries take effect once."""
        inbox = Inbox(self.tables.inbox, self.dialect)
        attempts = Attempts(self.tables.attempts, self.dialect)
        units = UnitsOfWork(self.engine, self.dialect, attempts, self.store, joining.join)
        order = Order(self.cursors, message_in_progress)
        patience = Patience(self.dialect, self.settings.outage_patience)
        return Consumer(
            engine=self.engine,
            inbox=inbox,
            attempts=attempts,
            units=units,
            order=order,
            failures=Failures(
                *(inbox, self.dead_letters, units, order, patience),
                rebuild=message_in_progress,
                seek_repair=self._seek_repair,
            ),
            patience=patience,
            max_deliveries=self.settings.max_deliveries,
            policy=self.retry_policy,
        )

    @cached_property
    def refusals(self) -> Refusals:
        """Keeps the messages that no task gets to see."""
        return Refusals(self.engine, Inbox(self.tables.inbox, self.dialect), self.dead_letters)

    # ── rules ───────────────────────────────────────────────────────────────────────────────

    def is_reliable(self, task: str) -> bool:
        """Whether the task of this name is handled exactly once."""
        return isinstance(self.app.tasks.get(task), ReliableTask) or self._is_named(task)

    def make_reliable(self, sender: Celery, **_: Any) -> None:
        """Make the tasks that ``eda_tasks`` names reliable, and Celery's own parts of canvas.

        A worker does so once more when it starts, for tasks defined after the app was finalized.
        """
        for name, task in sender._tasks.items():
            if self._is_named(name) or name in CANVAS_TASKS:
                made_reliable(task)

    def check(self) -> None:
        """Refuse to start where the promise could not be kept.

        Raises:
            ConfigurationError: a setting is wrong, or the tables are not there.
        """
        self.retry_policy  # noqa: B018  # reading it imports it
        schema.check(self.engine, self.tables)

    def store_apart(self, messages: Sequence[Message]) -> None:
        """Write *messages* to the outbox in a short transaction of their own."""
        with self.engine.begin() as connection:
            ids = self._add(connection, messages)
        self._hand_off(ids)

    def _add(self, connection: Connection, messages: Sequence[Message]) -> list[int]:
        """Write *messages* to the outbox, each at its place among those of its key."""
        return self.outbox.add(connection, self.sequences.number(connection, messages))

    def _hand_off(self, ids: list[int]) -> None:
        if self.settings.send_after_commit:
            self.sender.hand_off(ids)

    def _is_named(self, task: str) -> bool:
        return any(fnmatchcase(task, pattern) for pattern in self.settings.tasks)

    def _prepared_engine(self, patience: float) -> Engine:
        """An engine with the time-outs of the road.

        Each worker slot and each relay holds one connection, so that these bound the number.
        """
        options = self.dialect.engine_options(patience)
        engine = create_engine(self.url, max_overflow=-1, **options)
        self.dialect.prepare(engine, patience)
        return _forkable(engine)

    @contextmanager
    def _own_transaction(self) -> Iterator[Session]:
        progress = context.in_progress.get()
        if progress is not None and not progress.finished:
            session = Session(progress.connection, join_transaction_mode="create_savepoint")
        else:
            session = Session(self.engine)
        with session, joining.scope(session, self.store), session.begin():
            yield session


def _forkable(engine: Engine) -> Engine:
    """*engine*, from now on with connections of its own in every child that is forked."""
    os.register_at_fork(after_in_child=partial(engine.dispose, close=False))
    return engine
