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


@dataclass(frozen=True)
class Attempts:
    """The attempts table of one database."""

    table: Table
    dialect: Dialect

    def count(self, connection: Connection, consumer: str, identity: Identity) -> int:
        """Count one more redelivery; returns how many there were, this one included."""
        columns = self.table.c
        key = is_attempt(self.table, consumer, identity)
        fresh = self.dialect.insert_once(
            connection,
            self.table,
            {
                "consumer": consumer,
                "message_id": identity.id,
                "revision": identity.revision,
                "deliveries": 1,
                "at": self.dialect.now(),
            },
        )
        if not fresh:
            connection.execute(
                update(self.table)
                .where(key)
                .values(deliveries=columns.deliveries + 1, at=self.dialect.now())
            )
        deliveries: int = connection.execute(select(columns.deliveries).where(key)).scalar_one()
        return deliveries

    def forget(self, connection: Connection, consumer: str, identity: Identity) -> None:
        """Drop the count: the attempt had an outcome."""
        connection.execute(delete(self.table).where(is_attempt(self.table, consumer, identity)))
