"""The queues declared for subscriptions of this service.

Most brokers cannot list their queues. The queue of a subscription that was removed from the code
collects events forever; this list lets ``celery eda subscriptions`` find and drop it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kombu.utils import json
from sqlalchemy import Connection, Table, delete, select

from celery_eda.databases import Dialect
from celery_eda.events.subscriptions import Subscription


@dataclass(frozen=True)
class DeclaredQueues:
    """The declared queues of one service, in its database."""

    table: Table
    dialect: Dialect

    def add(self, connection: Connection, subscriptions: Mapping[str, Subscription]) -> None:
        """Record the queues of *subscriptions*, a mapping by queue. Idempotent."""
        table = self.table
        known = set(connection.scalars(select(table.c.queue)))
        for queue, subscription in sorted(subscriptions.items()):
            if queue not in known:
                patterns = json.dumps(subscription.patterns)
                values = {"queue": queue, "task": subscription.task, "patterns": patterns}
                self.dialect.insert_once(connection, table, values, now="at")

    def all(self, connection: Connection) -> dict[str, Subscription]:
        """Return the recorded subscriptions by queue, as they were when recorded."""
        rows = connection.execute(select(self.table)).all()
        return {row.queue: Subscription(row.task, tuple(json.loads(row.patterns))) for row in rows}

    def delete(self, connection: Connection, queue: str) -> None:
        """Delete the record of a *queue* that was deleted."""
        connection.execute(delete(self.table).where(self.table.c.queue == queue))
