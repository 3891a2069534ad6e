"""Events and subscriptions, as wired for one service."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from celery_eda.brokers import Brokers
from celery_eda.core.event import EVENT_EXCHANGE
from celery_eda.core.message import Message
from celery_eda.core.once import cached_once
from celery_eda.core.service import Service
from celery_eda.databases import Databases
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
from celery_eda.inbox import Inbox
from celery_eda.ordering import Ordering
from celery_eda.outbox import Outbox


class Events:
    """The events of one service, and its subscriptions to the events of all services.

    Attributes:
        registry: the classes and versions of event data.
        subscriptions: the handlers of events.
        queues: the queues of the subscriptions on the broker.
        projections: the projections by name.
    """

    def __init__(
        self,
        service: Service,
        databases: Databases,
        brokers: Brokers,
        ordering: Ordering,
        outbox: Outbox,
        inbox: Inbox,
    ) -> None:
        self._service = service
        self._databases = databases
        self._ordering = ordering
        self._outbox = outbox
        self.registry = EventRegistry()
        self.subscriptions = Subscriptions(service)
        self.queues = EventQueues(service, self.subscriptions)
        self.projections = ProjectionRegistry()
        service.add(self)
        brokers.topology.exchanges[EVENT_EXCHANGE] = self.queues
        outbox.companions.append(self)
        inbox.readdressers.append(self.subscriptions)

    def record(self, connection: Connection, messages: Sequence[Message]) -> None:
        """Append the events of *messages* to the event store."""
        if appends := [each.event_append for each in messages if each.event_append]:
            self.store.append(connection, appends)

    def record_queues(self) -> None:
        """Record the queues of this app's subscriptions, so that orphans can be found later."""
        if by_queue := self.subscriptions.by_queue:
            with self._databases.engine.begin() as connection:
                self.declarations.add(connection, by_queue)

    @cached_once
    def store(self) -> EventStore:
        """Every event that this service has emitted."""
        return EventStore(self._databases.tables.events, self._databases.dialect)

    @cached_once
    def emitter(self) -> Emitter:
        """Emits events."""
        return Emitter(self._service, self._outbox, self.registry)

    @cached_once
    def declarations(self) -> DeclaredQueues:
        """The queues that were declared for subscriptions."""
        return DeclaredQueues(self._databases.tables.declarations, self._databases.dialect)

    @cached_once
    def replay(self) -> Replay:
        """Sends events of the store again."""
        return Replay(self._databases.engine, self.store, self.emitter, self._outbox.writer)

    @cached_once
    def fold(self) -> StreamFold:
        """Folds streams of events."""
        databases = self._databases
        return StreamFold(
            engine=databases.engine,
            store=self.store,
            snapshots=Snapshots(databases.tables.snapshots, databases.dialect),
            sequences=self._ordering.sequences,
            registry=self.registry,
        )

    @cached_once
    def shadows(self) -> Shadows:
        """The shadows of projections."""
        return Shadows(self._databases.tables.projections, self._databases.dialect)

    @cached_once
    def rebuild(self) -> Rebuild:
        """Applies events to projections, and rebuilds projections."""
        return Rebuild(
            engine=self._databases.engine,
            shadows=self.shadows,
            subscriptions=self.subscriptions,
            registry=self.registry,
            cursors=self._ordering.cursors,
            progress=self._ordering.progress,
            replay=self.replay,
        )
