"""Sagas, as wired for one service."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from celery_eda.core import addresses
from celery_eda.core.once import cached_once
from celery_eda.core.service import Service
from celery_eda.databases import Chore, Databases
from celery_eda.outbox import Outbox
from celery_eda.requests import Requests, refuse_other_queue
from celery_eda.sagas.coordinator import Coordinator
from celery_eda.sagas.definition import Definitions
from celery_eda.sagas.engine import SagaEngine
from celery_eda.sagas.locks import SagaLocks
from celery_eda.sagas.messages import PublishedMessages
from celery_eda.sagas.store import SagaStore


class Sagas:
    """The sagas of one service.

    Attributes:
        outbox: of the service.
        definitions: the sagas that the code describes.
    """

    def __init__(
        self, service: Service, databases: Databases, outbox: Outbox, requests: Requests
    ) -> None:
        self._service = service
        self._databases = databases
        self._requests = requests
        self.outbox = outbox
        self.definitions = Definitions()
        service.add(self)
        outbox.retained.append(self)
        requests.listeners.append(self)

    @cached_once
    def store(self) -> SagaStore:
        """The instances, with the history of each."""
        tables = self._databases.tables
        return SagaStore(
            tables.sagas,
            tables.saga_steps,
            self._databases.dialect,
            self._requests.remote_errors,
        )

    @cached_once
    def coordinator(self) -> Coordinator:
        """Advances sagas."""
        databases = self._databases
        engine = SagaEngine(
            definitions=self.definitions,
            store=self.store,
            locks=SagaLocks(databases.tables.saga_locks, databases.dialect),
            messages=PublishedMessages(self._service, self._requests.client),
        )
        return Coordinator(engine, self._requests.remote_errors)

    def receive_reply(self, connection: Connection, request: UUID, outcome: Any) -> bool:
        """Advance the saga that sent *request*; return False if no saga did."""
        return bool(self.definitions.known) and self.coordinator.receive_reply(
            connection, request, outcome
        )

    def receive_wakeup(self, session: Session, wakeup: str, id: str, record: int) -> None:
        """Advance a saga after the end of a timer or sub-saga, or after a granted lock.

        Raises:
            Malformed: the message did not come over the queue of replies to this service.
        """
        refuse_other_queue(addresses.of_service(self._service.name))
        self.coordinator.wake(session.connection(), wakeup, id, record)

    def retention(self) -> list[Chore]:
        """The rule for sagas that have ended."""
        return [self.store.retention(self._service.settings.saga_retention)]
