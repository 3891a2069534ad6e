"""The queues that were made for subscriptions of this service, so that none is forgotten.

Most brokers do not tell which queues they have. One whose subscription is gone from the code would
fill for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kombu.utils import json
from sqlalchemy import Connection, Table, delete, select

from celery_eda.dialects.base import Dialect
from celery_eda.subscriptions import Subscription


@dataclass(frozen=True)
class Declarations:
    """What was declared by this service, in its database."""

    table: Table
    dialect: Dialect

    def note(self, connection: Connection, subscriptions: Mapping[str, Subscription]) -> None:
        """Write down *subscriptions*, by their queues. Repeating it is harmless."""
        table = self.table
        known = set(connection.scalars(select(table.c.queue)))
        for queue, subscription in sorted(subscriptions.items()):
            if queue not in known:
                patterns = json.dumps(subscription.patterns)
                values = {"queue": queue, "task": subscription.task, "patterns": patterns}
                self.dialect.insert_once(connection, table, values, now="at")

    def all(self, connection: Connection) -> dict[str, Subscription]:
        """All of them by their queues, as they were when they were written down."""
        rows = connection.execute(select(self.table)).all()
        return {row.queue: Subscription(row.task, tuple(json.loads(row.patterns))) for row in rows}

    def forget(self, connection: Connection, queue: str) -> None:
        """Forget one that was deleted."""
        table = self.table
        connection.execute(delete(table).where(table.c.queue == queue))
