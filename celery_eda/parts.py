"""The parts of one service, each made when it is first needed, from the app's settings."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from celery import Celery
from kombu.utils.imports import symbol_by_name
from sqlalchemy import URL, Connection, Engine, create_engine, make_url

from celery_eda.brokers import Connector, direct_enqueue_of, envelope_encoder_of, reply_consumer_of
from celery_eda.brokers.rabbitmq import dead_letter_exchange
from celery_eda.core import addresses, compression
from celery_eda.core.limits import Limits
from celery_eda.core.message import Message
from celery_eda.core.retry import Policy, checked_policy
from celery_eda.core.settings import Settings
from celery_eda.databases.registry import Dialect, dialect_of
from celery_eda.databases.tables import Tables
from celery_eda.dead_letters.audit import Audit
from celery_eda.dead_letters.repair import Repair
from celery_eda.dead_letters.repairers import Repairers, RepairTasks
from celery_eda.dead_letters.store import DeadLetterStore
from celery_eda.errors import ConfigurationError, UnsafeSetting
from celery_eda.events.declarations import DeclaredQueues
from celery_eda.events.emitter import Emitter
from celery_eda.events.fold import StreamFold
from celery_eda.events.projections.projection import ProjectionRegistry
from celery_eda.events.projections.rebuild import Rebuild
from celery_eda.events.projections.shadows import Shadows
from celery_eda.events.queues import EventQueues
from celery_eda.events.registry import EventRegistry
from celery_eda.events.replay import Replay
from celery_eda.events.snapshots import Snapshots
from celery_eda.events.store import EventStore
from celery_eda.events.subscriptions import Subscriptions
from celery_eda.inbox.attempts import Attempts
from celery_eda.inbox.consumer import Consumer
from celery_eda.inbox.failures import Failures
from celery_eda.inbox.ordering import ReleasedMessages, TurnKeeper
from celery_eda.inbox.refusals import Refusals
from celery_eda.inbox.store import InboxStore
from celery_eda.inbox.task import ReliableTask
from celery_eda.inbox.transient import TransientErrors
from celery_eda.inbox.unit_of_work import UnitsOfWork
from celery_eda.ordering.cursors import Cursors
from celery_eda.ordering.sequences import Sequences
from celery_eda.outbox.housekeeping import Housekeeping
from celery_eda.outbox.publisher import Publisher
from celery_eda.outbox.relay import Relay
from celery_eda.outbox.result_backend import ResultBackend
from celery_eda.outbox.sender import CommitSender
from celery_eda.outbox.store import OutboxStore
from celery_eda.outbox.transactions.base import Store, Written
from celery_eda.requests.client import RequestClient
from celery_eda.requests.mailbox import Mailbox
from celery_eda.requests.outcomes import ReplyReader
from celery_eda.requests.remote_errors import RemoteErrors
from celery_eda.requests.responder import Responder
from celery_eda.requests.store import RequestStore
from celery_eda.requests.watcher import ReplyWatcher
from celery_eda.sagas.coordinator import Coordinator
from celery_eda.sagas.definition import Definitions
from celery_eda.sagas.engine import SagaEngine
from celery_eda.sagas.locks import SagaLocks
from celery_eda.sagas.store import SagaStore

if TYPE_CHECKING:
    from celery_eda.brokers.database.publish import DirectEnqueue

T = TypeVar("T")


class made_once(Generic[T]):  # noqa: N801  # it is used as a decorator
    """A part that is made when it is first needed, once, however many threads need it then."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._start_afresh()
        os.register_at_fork(after_in_child=self._start_afresh)
        self.__doc__ = make.__doc__

    def _start_afresh(self) -> None:
        # Nobody would ever give back what a thread of the parent held when it forked.
        self._making = threading.RLock()

    def __get__(self, parts: Any, owner: object = None) -> T:
        name = self._make.__name__
        with self._making:
            if name not in vars(parts):
                vars(parts)[name] = self._make(parts)
            made: T = vars(parts)[name]
            return made


class Parts:
    """What one Celery app needs to be reliable on one database.

    Attributes:
        app: the Celery app.
    """

    app: Celery

    def __init__(self, engine: Engine | None = None) -> None:
        self._engine = engine

    # ── settings and database ───────────────────────────────────────────────────────────────

    @made_once
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

    @made_once
    def tables(self) -> Tables:
        """The tables of this service. Use ``Tables.on(metadata)`` to merge them into yours."""
        return Tables.on(prefix=self.settings.table_prefix, schema=self.settings.schema)

    @made_once
    def engine(self) -> Engine:
        """The engine of the service's own database, for transactions of producers and handlers."""
        if self._engine is not None:
            return _forkable(self._engine)
        return self._prepared_engine(self.settings.transaction_timeout)

    @made_once
    def relay_engine(self) -> Engine:
        """The engine of the relays, whose claims end sooner than a handler's transaction."""
        engine = self._prepared_engine(self.settings.claim_timeout)
        self.dialect.configure_relay_engine(engine)
        return engine

    @made_once
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

    @made_once
    def dialect(self) -> Dialect:
        """What differs from database to database."""
        return dialect_of(self.url, claim_timeout=self.settings.claim_timeout)

    @made_once
    def outbox(self) -> OutboxStore:
        """Messages committed and not sent yet."""
        return OutboxStore(self.tables.outbox, self.dialect, envelope_encoder_of(self.app))

    @made_once
    def inbox(self) -> InboxStore:
        """Messages handled already."""
        return InboxStore(self.tables.inbox, self.dialect)

    @made_once
    def shortcut(self) -> DirectEnqueue | None:
        """What puts messages into their queues, where this database is the broker too."""
        return direct_enqueue_of(self.app, self.url, self.tables)

    @made_once
    def dead_letters(self) -> DeadLetterStore:
        """Messages that could not be sent or handled."""
        return DeadLetterStore(self.tables.dead_letters, self.dialect)

    @made_once
    def audit(self) -> Audit:
        """What was done to dead letters."""
        return Audit(self.tables.audit, self.dialect)

    @made_once
    def repair(self) -> Repair:
        """Redrives, edits, skips and discards dead letters."""
        return Repair(self.dead_letters, self.audit, self.cursors)

    @made_once
    def repairers(self) -> Repairers:
        """Lets functions decide about dead letters."""
        return Repairers(self.repair, self.app.tasks.get, self.settings.max_repairs)

    @made_once
    def repair_tasks(self) -> RepairTasks:
        """The tasks that repair others."""
        return RepairTasks(lambda: self.app, lambda: self.settings.repair_queue)

    @made_once
    def sender(self) -> CommitSender:
        """Sends what this process commits, right after the commit."""
        return CommitSender(self.relay)

    @made_once
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

    @made_once
    def sequences(self) -> Sequences:
        """The numbers given to messages with an ordering key."""
        return Sequences(self.tables.sequences, self.dialect)

    @made_once
    def event_store(self) -> EventStore:
        """Every event that this service has emitted."""
        return EventStore(self.tables.events, self.dialect)

    @made_once
    def folding(self) -> StreamFold:
        """Folds streams of events."""
        return StreamFold(
            engine=self.engine,
            store=self.event_store,
            snapshots=Snapshots(self.tables.snapshots, self.dialect),
            sequences=self.sequences,
            types=self.event_types,
        )

    @made_once
    def event_types(self) -> EventRegistry:
        """What the data of events look like."""
        return EventRegistry()

    @made_once
    def subscriptions(self) -> Subscriptions:
        """The handlers of events."""
        return Subscriptions(lambda: self.service)

    @made_once
    def event_queues(self) -> EventQueues:
        """The queues of the subscriptions on the broker."""
        return EventQueues(self.subscriptions, self._queue_arguments)

    @made_once
    def declarations(self) -> DeclaredQueues:
        """The queues declared for subscriptions."""
        return DeclaredQueues(self.tables.declarations, self.dialect)

    def note_subscriptions(self) -> None:
        """Write down whose queues are made from now on."""
        if by_queue := self.subscriptions.by_queue:
            with self.engine.begin() as connection:
                self.declarations.add(connection, by_queue)

    @made_once
    def emitting(self) -> Emitter:
        """Emits events."""
        return Emitter(self.app, self.publisher, lambda: self.service, self.event_types)

    @made_once
    def replaying(self) -> Replay:
        """Sends stored events again."""
        return Replay(self.engine, self.event_store, self.emitting, self.store_apart)

    @made_once
    def projections(self) -> ProjectionRegistry:
        """The projections of this app."""
        return ProjectionRegistry()

    @made_once
    def shadows(self) -> Shadows:
        """The shadows of projections."""
        return Shadows(self.tables.projections, self.dialect)

    @made_once
    def projecting(self) -> Rebuild:
        """Applies events to projections, and rebuilds projections."""
        return Rebuild(
            engine=self.engine,
            shadows=self.shadows,
            subscriptions=self.subscriptions,
            types=self.event_types,
            cursors=self.cursors,
            replay=self.replaying,
        )

    @made_once
    def cursors(self) -> Cursors:
        """The numbers awaited of each ordering key, and the messages parked."""
        return Cursors(self.tables.cursors, self.tables.parked, self.dialect)

    @made_once
    def housekeeping(self) -> Housekeeping:
        """Deletes rows that are past their retention; relays run it beside their sending."""
        tables, settings = self.tables, self.settings
        return Housekeeping(
            self.relay_engine,
            (
                ReleasedMessages(self.cursors, self.outbox, settings.transaction_timeout),
                self.dead_letters.retention(tables.audit, settings.dead_letter_retention),
                self.inbox.retention(
                    tables.dead_letters, tables.parked, tables.outbox, settings.inbox_retention
                ),
                Attempts(tables.attempts, self.dialect).retention(settings.inbox_retention),
                self.requests.retention(settings.request_retention),
                self.audit.retention(tables.dead_letters, settings.audit_retention),
                self.saga_store.retention(settings.saga_retention),
            ),
        )

    @made_once
    def store(self) -> Store:
        """Where captured messages go."""
        return Store(self._add, self._hand_off, self.store_apart)

    @made_once
    def publisher(self) -> Publisher:
        """Decides where a message goes."""
        return Publisher(self.settings.outside, self.is_reliable, self.store_apart)

    @made_once
    def retry_policy(self) -> Policy | None:
        """What decides on further attempts of tasks without a policy of their own.

        Raises:
            ConfigurationError: ``eda_retry_policy`` is no policy.
        """
        if (given := self.settings.retry_policy) is None:
            return None
        try:
            return checked_policy(symbol_by_name(given))
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigurationError(
                f"eda_retry_policy names {given!r}, which cannot be imported: {error}. "
                "Set it to `module:name` of a RetryPolicy or a function."
            ) from error

    @made_once
    def consumer(self) -> Consumer:
        """Makes deliveries take effect once."""
        attempts = Attempts(self.tables.attempts, self.dialect)
        units = UnitsOfWork(self.engine, self.dialect, attempts, self.store)
        turns = TurnKeeper(self.cursors)
        transient_errors = TransientErrors(self.dialect, self.settings.outage_patience)
        return Consumer(
            engine=self.engine,
            inbox=self.inbox,
            attempts=attempts,
            units=units,
            turns=turns,
            failures=Failures(
                inbox=self.inbox,
                dead_letters=self.dead_letters,
                units=units,
                turns=turns,
                responder=self.responder,
                transient_errors=transient_errors,
                repair_tasks=self.repair_tasks,
            ),
            responder=self.responder,
            transient_errors=transient_errors,
            max_deliveries=self.settings.max_deliveries,
            policy=self.retry_policy,
        )

    @made_once
    def remote_errors(self) -> RemoteErrors:
        """The types of errors that travel with replies."""
        return RemoteErrors()

    @made_once
    def responder(self) -> Responder:
        """Answers requests."""
        return Responder(self.app, self.remote_errors)

    @made_once
    def requests(self) -> RequestStore:
        """The durable requests of this service."""
        name = self.settings.service or self.app.main
        address = addresses.of_service(name) if name else None
        serializer = self.app.conf.result_serializer
        return RequestStore(self.tables.requests, self.dialect, address, serializer)

    @made_once
    def reading(self) -> ReplyReader:
        """How replies are read."""
        settings, conf = self.settings, self.app.conf
        compression.limit_decompression(settings.max_decompressed_bytes)
        limits = Limits(settings.max_message_bytes, settings.max_nesting)
        accept = conf.result_accept_content or conf.accept_content
        return ReplyReader.of(limits, accept, self.remote_errors)

    @made_once
    def mailbox(self) -> Mailbox:
        """Where the replies to this process come in."""
        expires = self.settings.reply_expires
        return Mailbox(reply_consumer_of(self.app, expires=expires), self.reading)

    @made_once
    def reply_watcher(self) -> ReplyWatcher:
        """Looks for the durable replies that this process awaits."""
        return ReplyWatcher(self.engine, self.requests, self.reading)

    @made_once
    def requesting(self) -> RequestClient:
        """Asks for replies."""
        return RequestClient(
            *(self.app, self.reply_watcher, lambda: self.mailbox),
            *(self.publisher, lambda: self.service, self.settings),
        )

    @made_once
    def saga_definitions(self) -> Definitions:
        """The sagas that this app knows."""
        return Definitions()

    @made_once
    def saga_store(self) -> SagaStore:
        """Each saga of this service, and what became of its parts."""
        tables = self.tables
        return SagaStore(tables.sagas, tables.saga_steps, self.dialect, self.remote_errors)

    @made_once
    def sagas(self) -> Coordinator:
        """Moves sagas on."""
        engine = SagaEngine(
            app=self.app,
            definitions=self.saga_definitions,
            store=self.saga_store,
            locks=SagaLocks(self.tables.saga_locks, self.dialect),
            request=self.requesting.ask,
            address=lambda: addresses.of_service(self.service),
        )
        return Coordinator(engine, self.remote_errors)

    @made_once
    def refusals(self) -> Refusals:
        """Keeps the messages that no task gets to see."""
        return Refusals(self.engine, self.inbox, self.dead_letters, self.responder, self.store)

    def is_reliable(self, task: str) -> bool:
        """Whether the task of this name is handled exactly once."""
        return isinstance(self.app.tasks.get(task), ReliableTask) or self.is_named(task)

    def is_named(self, task: str) -> bool:
        """Whether ``eda_tasks`` names the task, and it is none that every worker has to call."""
        named = any(fnmatchcase(task, pattern) for pattern in self.settings.tasks)
        return named and task not in self.subscriptions.per_worker

    # ── sending ─────────────────────────────────────────────────────────────────────────────

    def relay(self) -> Relay:
        """A relay of its own, with its own connections. For one thread."""
        return Relay(
            self.relay_engine,
            self.outbox,
            self.dead_letters,
            Connector(self.app, self.settings.publish_timeout),
            ResultBackend(self.app),
            self.settings,
            self.housekeeping,
        )

    def store_apart(self, messages: Sequence[Message]) -> None:
        """Write *messages* to the outbox in a short transaction of their own."""
        with self.engine.begin() as connection:
            ids = self._add(connection, messages)
        self._hand_off(ids)

    def _add(self, connection: Connection, messages: Sequence[Message]) -> list[Written]:
        """Write *messages*, each at its place among those of its key.

        They go into their queues if those are in this database, else to the outbox.
        """
        queues: list[str] = []
        left = self.sequences.number(connection, messages)
        if drafts := [each.draft for each in left if each.draft]:
            self.event_store.append(connection, drafts)
        if self.shortcut:
            queues, left = self.shortcut.put(connection, left)
        ids = self.outbox.add(connection, left) if left else []
        self.requests.note(connection, messages)
        return [*ids, *queues]

    def _hand_off(self, written: list[Written]) -> None:
        ids = [each for each in written if isinstance(each, int)]
        if self.shortcut and len(ids) < len(written):
            self.shortcut.wake_all()
        if ids and self.settings.send_after_commit:
            self.sender.hand_off(ids)

    def _queue_arguments(self) -> dict[str, Any]:
        """Those of a queue that an app with the same settings would make by itself."""
        if self.app.conf.task_default_queue_type != "quorum":
            return {}
        limit = self.settings.delivery_limit
        limits = dead_letter_exchange.queue_arguments(limit, self.service) if limit else {}
        return {**limits, "x-queue-type": "quorum"}

    def _prepared_engine(self, patience: float) -> Engine:
        """An engine with the time-outs of the road.

        Each worker slot and each relay holds one connection, so that these bound the number.
        """
        options = self.dialect.engine_options(patience)
        engine = create_engine(self.url, max_overflow=-1, **options)
        self.dialect.configure_engine(engine, patience)
        return _forkable(engine)


def _forkable(engine: Engine) -> Engine:
    """*engine*, from now on with connections of its own in every child that is forked."""
    os.register_at_fork(after_in_child=partial(engine.dispose, close=False))
    return engine
