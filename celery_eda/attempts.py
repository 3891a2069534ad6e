"""Redeliveries of messages that have had no outcome, so that one that kills its worker ends.

A row is committed on its own before the handler runs and goes with the outcome. The first
delivery of a message costs nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Table, delete, select, update

from celery_eda.dialects.base import Dialect
from celery_eda.message import Identity
from celery_eda.tables import is_attempt

#: The cause of a loss: the handler overran its hard time limit.
TIME_LIMIT = "time limit"


@dataclass(frozen=True)
class Attempts:
    """The attempts table of one database."""

    table: Table
    dialect: Dialect

    def count(self, connection: Connection, consumer: str, identity: Identity) -> int:
        """Count one more redelivery; returns how many there were, this one included."""
        columns = self.table.c
        key = is_attempt(self.table, consumer, identity)
        if not self._insert(connection, consumer, identity, deliveries=1):
            connection.execute(
                update(self.table)
                .where(key)
                .values(deliveries=columns.deliveries + 1, cause=None, at=self.dialect.now())
            )
        deliveries: int = connection.execute(select(columns.deliveries).where(key)).scalar_one()
        return deliveries

    def note(self, connection: Connection, consumer: str, identity: Identity, cause: str) -> None:
        """Note why the delivery in progress has no outcome, until the next one is counted."""
        if not self._insert(connection, consumer, identity, deliveries=0, cause=cause):
            key = is_attempt(self.table, consumer, identity)
            connection.execute(update(self.table).where(key).values(cause=cause))

    def cause(self, connection: Connection, consumer: str, identity: Identity) -> str | None:
        """Why the last delivery had no outcome, if that was noted."""
        key = is_attempt(self.table, consumer, identity)
        cause: str | None = connection.scalar(select(self.table.c.cause).where(key))
        return cause

    def _insert(
        self, connection: Connection, consumer: str, identity: Identity, **values: object
    ) -> bool:
        return self.dialect.insert_once(
            connection,
            self.table,
            {
                "consumer": consumer,
                "message_id": identity.id,
                "revision": identity.revision,
                "at": self.dialect.now(),
                **values,
            },
        )

    def forget(self, connection: Connection, consumer: str, identity: Identity) -> None:
        """Drop the count: the attempt had an outcome."""
        connection.execute(delete(self.table).where(is_attempt(self.table, consumer, identity)))
