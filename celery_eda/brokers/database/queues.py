"""Messages in queues of a database which is the broker.

A taker leases messages. Each lease counts the message's fence up by one, and only the taker with
that fence can complete the message. No clock ends a lease: it ends when its taker is dead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Connection,
    Engine,
    Row,
    Table,
    delete,
    func,
    insert,
    select,
    update,
)

from celery_eda.brokers.database.queueing import NOT_DUE, Passed, Presence, Queueing, lowest
from celery_eda.core.clock import utc
from celery_eda.databases import Tables

#: The exchange that routes to every queue by the queue's name.
BY_NAME = ""


@dataclass(frozen=True)
class Queued:
    """A message to put into a queue.

    Attributes:
        rank: lower ranks come first; within a rank the oldest message does.
        delay: seconds until the message is due; None for at once.
        lifetime: seconds after which the message is dropped unless it is leased; None for never.
    """

    queue: str
    message: str
    body: bytes
    rank: int
    delay: float | None = None
    lifetime: float | None = None


@dataclass(frozen=True)
class Lease:
    """One lease of one message: void as soon as the message is leased again."""

    id: int
    fence: int

    @classmethod
    def of(cls, tag: str) -> Lease:
        """The lease that a delivery *tag* names."""
        id_, _, fence = tag.partition(":")
        return cls(int(id_), int(fence))

    @property
    def tag(self) -> str:
        return f"{self.id}:{self.fence}"


@dataclass(frozen=True)
class Queues:
    """The queues of one database. What is written takes effect with the caller's commit."""

    tables: Tables
    queueing: Queueing

    @property
    def table(self) -> Table:
        return self.tables.queue

    # ── messages ────────────────────────────────────────────────────────────────────────────

    def put(self, connection: Connection, messages: Sequence[Queued]) -> None:
        """Put *messages* into their queues, in this order, and wake the takers of those queues."""
        if messages:
            self.queueing.enqueue(connection, self.tables, [vars(each) for each in messages])

    def lease(
        self, connection: Connection, queue: str, taker: int, room: int, passed: Passed
    ) -> Sequence[Row[Any]]:
        """Lease up to *room* messages to *taker*; no other taker gets them while it is alive.

        Messages up to the ids *passed*, one a rank, may be left out.
        """
        return self.queueing.lease(connection, self.table, queue, taker, room, passed)

    def take(
        self, connection: Connection, queue: str, room: int, passed: Passed
    ) -> Sequence[Row[Any]]:
        """Delete up to *room* messages and return them; *passed* is that of :meth:`lease`."""
        return self.queueing.take(connection, self.table, queue, room, passed)

    def complete(self, connection: Connection, leases: Collection[Lease]) -> None:
        """Delete handled messages; those that have been leased again stay."""
        if leases:
            done = [{"id": each.id, "fence": each.fence} for each in leases]
            self.queueing.complete(connection, self.table, done)

    def requeue(self, connection: Connection, leases: Collection[Lease]) -> None:
        """Free leased messages, at their old position."""
        columns = self.table.c
        for each in leases:
            self._free(connection, (columns.id == each.id) & (columns.fence == each.fence))

    def come_due(self, connection: Connection) -> set[str]:
        """Free the messages that are due by now; returns their queues."""
        columns = self.table.c
        due = (columns.owner == NOT_DUE) & (columns.due <= self.queueing.dialect.now())
        if connection.scalar(select(columns.id).where(due).limit(1)) is None:
            return set()
        return self._free(connection, due)

    def next_due(self, connection: Connection) -> float | None:
        """Seconds until the next message is due; None if no message is delayed."""
        columns = self.table.c
        now = self.queueing.dialect.now().label("now")
        query = select(func.min(columns.due), now).where(columns.owner == NOT_DUE)
        due, now_ = connection.execute(query).one()
        return None if due is None else max(0.0, (_utc(due) - _utc(now_)).total_seconds())

    def expire(self, connection: Connection) -> None:
        """Drop free messages whose lifetime has ended."""
        columns = self.table.c
        old = (columns.expires_at <= self.queueing.dialect.now()) & columns.owner.is_(None)
        if connection.scalar(select(columns.id).where(old).limit(1)) is not None:
            connection.execute(delete(self.table).where(old))

    def size(self, connection: Connection, queue: str) -> int:
        """The number of free messages in a queue: neither leased nor delayed."""
        columns = self.table.c
        free = (columns.queue == queue) & columns.owner.is_(None)
        return int(connection.scalar(select(func.count()).where(free)) or 0)

    def purge(self, connection: Connection, queue: str) -> int:
        """Delete the free and the delayed messages of a queue; returns their number."""
        columns = self.table.c
        free = columns.owner.is_(None) | (columns.owner == NOT_DUE)
        return connection.execute(delete(self.table).where(columns.queue == queue, free)).rowcount

    # ── queues and bindings ─────────────────────────────────────────────────────────────────

    def bind(
        self,
        connection: Connection,
        queue: str,
        exchange: str = BY_NAME,
        routing_key: str | None = None,
        owner: int | None = None,
        *,
        takes_over: bool = False,
    ) -> None:
        """Bind a queue to an exchange; a binding to the exchange ``BY_NAME`` declares the queue.

        A binding with an *owner*, and a queue declared with one, is deleted when that taker is
        dead. A binding that exists keeps its owner, unless this owner *takes_over*.
        """
        table = self.tables.bindings
        key = {"exchange": exchange, "routing_key": routing_key or "", "queue": queue}
        row = {**key, "owner": owner}
        if not self.queueing.dialect.insert_once(connection, table, row) and takes_over:
            is_it = [table.c[name] == value for name, value in key.items()]
            connection.execute(update(table).where(*is_it).values(owner=owner))

    def unbind(self, connection: Connection, queue: str, exchange: str, routing_key: str) -> None:
        """Delete a binding. Repeating it is harmless."""
        columns = self.tables.bindings.c
        is_it = (columns.exchange == exchange, columns.routing_key == routing_key)
        connection.execute(delete(self.tables.bindings).where(columns.queue == queue, *is_it))

    def bindings(self, connection: Connection, exchange: str) -> Sequence[Row[Any, Any]]:
        """Routing key and queue of all bindings of an exchange."""
        columns = self.tables.bindings.c
        query = select(columns.routing_key, columns.queue).where(columns.exchange == exchange)
        return connection.execute(query).all()

    def exists(self, connection: Connection, queue: str) -> bool:
        """True if a queue is declared."""
        columns = self.tables.bindings.c
        found = select(columns.queue).where(columns.queue == queue, columns.exchange == BY_NAME)
        return connection.scalar(found) is not None

    def drop(self, connection: Connection, queues: Collection[str]) -> None:
        """Delete queues with all of their messages and bindings."""
        if queues:
            for table in (self.table, self.tables.bindings):
                connection.execute(delete(table).where(table.c.queue.in_(queues)))

    # ── takers ──────────────────────────────────────────────────────────────────────────────

    def register(self, connection: Connection, presence: Presence) -> int:
        """Make this connection a taker; returns the taker's id. Commits.

        The presence is announced before the commit: a taker seen without one counts as dead.
        """
        values = {"name": presence.name, "at": self.queueing.dialect.now()}
        table = self.tables.takers
        taker: int = connection.execute(
            insert(table).values(**values).returning(table.c.id)
        ).scalar_one()
        presence.announce(connection, taker)
        connection.commit()
        return taker

    def dead_takers(self, connection: Connection, engine: Engine, me: int) -> list[int]:
        """Takers other than *me* that are dead and still have leases, bindings or queues."""
        return self.queueing.dead_takers(connection, engine, self.tables, me)

    def reclaim(self, connection: Connection, taker: int) -> set[str]:
        """Free the messages leased to *taker*, and delete its private queues.

        Returns:
            The queues that got messages back.
        """
        bindings, takers = self.tables.bindings, self.tables.takers
        connection.execute(delete(takers).where(takers.c.id == taker))
        private = select(bindings.c.queue).where(
            bindings.c.owner == taker, bindings.c.exchange == BY_NAME
        )
        self.drop(connection, list(connection.scalars(private)))
        connection.execute(delete(bindings).where(bindings.c.owner == taker))
        return self._free(connection, self.table.c.owner == taker)

    def _free(self, connection: Connection, which: Any) -> set[str]:
        """Free these messages and wake the takers of their queues; returns those queues."""
        columns = self.table.c
        statement = update(self.table).where(which).values(owner=None)
        found = lowest(connection.execute(statement.returning(columns.queue, columns.id)).all())
        self.queueing.wake(connection, self.tables, found)
        return set(found)


def _utc(value: Any) -> datetime:
    moment: datetime = datetime.fromisoformat(value) if isinstance(value, str) else value
    return utc(moment)
