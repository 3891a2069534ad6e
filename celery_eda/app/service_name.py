"""The name of a service, held on the broker by the workers of one database only.

Two services of one name would take each other's replies, events and repairs, and would give the
same numbers to different messages of a key. A worker refuses to start while workers with another
database hold the name of its service. The name is free again some time after the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from uuid import UUID, uuid4

from celery import bootsteps
from kombu import Connection
from sqlalchemy import Engine, Table, select
from sqlalchemy.exc import SQLAlchemyError

from celery_eda.brokers import Brokers
from celery_eda.core import redaction
from celery_eda.databases import Dialect
from celery_eda.errors import NameTaken

log = redaction.logger(__name__)

#: Seconds after which a name is free that nobody holds any more.
EXPIRES = 60.0
#: How often a worker holds the name again within that time.
RENEWALS = 4


@dataclass(frozen=True)
class ServiceName:
    """The name of one service, and the id of the service in its database.

    A copy of the database, restored from a backup elsewhere, is the same service.
    """

    name: str | None
    engine: Engine
    table: Table
    dialect: Dialect
    brokers: Brokers

    @classmethod
    def of(cls, eda: Any) -> ServiceName:
        """The name of the service *eda*."""
        databases = eda.databases
        table = databases.tables.services
        return cls(
            eda.service.name_or_none, databases.engine, table, databases.dialect, eda.brokers
        )

    def hold(self, connection: Connection) -> None:
        """Hold the name on the broker for a while.

        Raises:
            NameTaken: a service with another database holds it.
        """
        if self.name is None:  # no other service can know the name
            return
        try:
            owner = str(self.id)
        except SQLAlchemyError as error:
            log.warning(
                "the name %s is not held while the database is away, trying again in %g s: %r",
                self.name,
                EXPIRES / RENEWALS,
                error,
            )
            return
        if not self.brokers.hold_name(connection, owner, EXPIRES):
            raise NameTaken(
                f"A service with another database uses the name {self.name!r} on this broker. They "
                "would take each other's replies, events and repairs. Give each service a name of "
                f"its own with eda_service. If it has just got a new database, wait {EXPIRES:g} s "
                "after its last worker has ended."
            )

    @cached_property
    def id(self) -> UUID:
        """The id of the service, made on first use."""
        columns = self.table.c
        query = select(columns.id).where(columns.name == self.name)
        with self.engine.begin() as connection:
            if (known := connection.scalar(query)) is None:
                fresh = {"name": self.name, "id": uuid4()}
                self.dialect.insert_once(connection, self.table, fresh, now="at")
                known = connection.scalar(query)
        assert isinstance(known, UUID)
        return known


class HoldName(bootsteps.StartStopStep):
    """Holds the name of the service while the worker runs."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self.service_name = ServiceName.of(consumer.app.eda)
        self.renewing: Any = None

    def start(self, consumer: Any) -> None:
        self.service_name.hold(consumer.connection)
        call = (consumer.call_soon, (self._renew, consumer))
        self.renewing = consumer.timer.call_repeatedly(EXPIRES / RENEWALS, *call)

    def _renew(self, consumer: Any) -> None:
        self.service_name.hold(consumer.connection)

    def stop(self, consumer: Any) -> None:
        if self.renewing is not None:
            self.renewing.cancel()
