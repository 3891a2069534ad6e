"""The count of redeliveries without an outcome: a message that kills its workers is dead-lettered.

A row is committed in a transaction of its own before the handler runs, and is deleted together
with the record of the outcome. The first delivery of a message writes nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Table,
    and_,
    bindparam,
    delete,
    select,
    update,
)

from celery_eda.core.identity import Identity
from celery_eda.databases import Dialect, Retention

#: The cause of a delivery without an outcome: the handler exceeded its hard time limit.
TIME_LIMIT = "time limit"
#: Another one: the database ended the transaction of the handler, because it was idle for too long.
IDLE = "idle transaction"
#: Redeliveries without an outcome of a message whose handler stalls; each takes that long.
MOST_STALLS = 2


def is_attempt(table: Table) -> ColumnElement[bool]:
    """The condition that a row of *table*, inbox or attempts, belongs to an :func:`attempt`."""
    columns = table.c
    return and_(
        columns.consumer == bindparam("its_consumer"),
        columns.message_id == bindparam("its_message"),
        columns.revision == bindparam("its_revision"),
    )


def attempt(consumer: str, identity: Identity) -> dict[str, Any]:
    """Parameters for :func:`is_attempt`: one consumer's attempt at one message."""
    return {
        "its_consumer": consumer,
        "its_message": identity.id,
        "its_revision": identity.revision,
    }


@dataclass(frozen=True)
class Attempts:
    """The attempts table of one database."""

    table: Table
    dialect: Dialect

    def retention(self, seconds: float | None) -> Retention:
        """Counts without a later outcome may be deleted after *seconds*."""
        return Retention("attempts", self.table, self.dialect, seconds)

    def count(self, connection: Connection, consumer: str, identity: Identity) -> int:
        """Count one more redelivery.

        Returns:
            Number of redeliveries so far, this one included.
        """
        columns, key = self.table.c, is_attempt(self.table)
        its = attempt(consumer, identity)
        if not self._insert(connection, consumer, identity, deliveries=1):
            one_more = update(self.table).where(key)
            one_more = one_more.values(
                deliveries=columns.deliveries + 1, cause=None, at=self.dialect.now()
            )
            connection.execute(one_more, its)
        deliveries: int = connection.execute(
            select(columns.deliveries).where(key), its
        ).scalar_one()
        return deliveries

    def record_cause(
        self, connection: Connection, consumer: str, identity: Identity, cause: str
    ) -> None:
        """Record why the delivery in progress has no outcome, until the next one is counted."""
        if not self._insert(connection, consumer, identity, deliveries=0, cause=cause):
            recording = update(self.table).where(is_attempt(self.table)).values(cause=cause)
            connection.execute(recording, attempt(consumer, identity))

    def cause(self, connection: Connection, consumer: str, identity: Identity) -> str | None:
        """The recorded reason why the last delivery had no outcome, if there is one."""
        query = select(self.table.c.cause).where(is_attempt(self.table))
        cause: str | None = connection.scalar(query, attempt(consumer, identity))
        return cause

    def _insert(
        self, connection: Connection, consumer: str, identity: Identity, **values: object
    ) -> bool:
        its = {"consumer": consumer, "message_id": identity.id, "revision": identity.revision}
        return self.dialect.insert_once(connection, self.table, {**its, **values}, now="at")

    def delete(self, connection: Connection, consumer: str, identity: Identity) -> None:
        """Delete the count: the attempt has an outcome."""
        its = attempt(consumer, identity)
        connection.execute(delete(self.table).where(is_attempt(self.table)), its)
