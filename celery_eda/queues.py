"""Messages that wait for a worker, where the database itself is the broker.

A taker leases messages: each lease counts the message's fence up by one, and only who still has
that fence can complete it. A lease has no end by the clock; it ends when its taker is gone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
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

from celery_eda.dialects.queueing import NOT_DUE, Passed, Presence, Queueing, lowest
from celery_eda.tables import Tables

#: The exchange through which every queue is known by its name.
BY_NAME = ""


@dataclass(frozen=True)
class Waiting:
    """A message to be put into a queue.

    Attributes:
        rank: the lower, the sooner; of one rank the oldest comes first.
        delay: seconds until it is due, None for at once.
        lifetime: seconds after which it is dropped unless somebody has taken it, None for never.
    """

    queue: str
    message: str
    body: bytes
    rank: int
    delay: float | None = None
    lifetime: float | None = None


@dataclass(frozen=True)
class Lease:
    """One taking of one message: void as soon as somebody else has taken it."""

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
    dialect: Queueing

    @property
    def table(self) -> Table:
        return self.tables.queue

    # ── messages ────────────────────────────────────────────────────────────────────────────

    def put(self, connection: Connection, messages: Sequence[Waiting]) -> None:
        """Put *messages* into their queues, in this order, and wake who takes from those."""
        if messages:
            self.dialect.enqueue(connection, self.tables, [vars(each) for each in messages])

    def lease(
        self, connection: Connection, queue: str, taker: int, room: int, passed: Passed
    ) -> Sequence[Row[Any]]:
        """Let *taker* have up to *room* messages; nobody else gets them while it is there.

        Only those are looked for that are behind the ids *passed*, of which each rank has one.
        """
        return self.dialect.lease(connection, self.table, queue, taker, room, passed)

    def take(
        self, connection: Connection, queue: str, room: int, passed: Passed
    ) -> Sequence[Row[Any]]:
        """Take up to *room* messages for good, likewise."""
        return self.dialect.take(connection, self.table, queue, room, passed)

    def complete(self, connection: Connection, leases: Collection[Lease]) -> None:
        """Delete messages that are done with; those that somebody else has taken stay."""
        if leases:
            done = [{"id": each.id, "fence": each.fence} for each in leases]
            self.dialect.complete(connection, self.table, done)

    def give_back(self, connection: Connection, leases: Collection[Lease]) -> None:
        """Let others have messages again, at their old place."""
        columns = self.table.c
        for each in leases:
            self._free(connection, (columns.id == each.id) & (columns.fence == each.fence))

    def come_due(self, connection: Connection) -> set[str]:
        """Let those be taken whose time has come; returns their queues."""
        columns = self.table.c
        due = (columns.owner == NOT_DUE) & (columns.due <= self.dialect.now())
        if connection.scalar(select(columns.id).where(due).limit(1)) is None:
            return set()
        return self._free(connection, due)

    def next_due(self, connection: Connection) -> float | None:
        """Seconds until the next one is due; None if none is waiting for its time."""
        columns = self.table.c
        now = self.dialect.now().label("now")
        query = select(func.min(columns.due), now).where(columns.owner == NOT_DUE)
        due, now_ = connection.execute(query).one()
        return None if due is None else max(0.0, (_moment(due) - _moment(now_)).total_seconds())

    def expire(self, connection: Connection) -> None:
        """Drop those whose lifetime has ended untaken."""
        columns = self.table.c
        old = (columns.expires_at <= self.dialect.now()) & columns.owner.is_(None)
        if connection.scalar(select(columns.id).where(old).limit(1)) is not None:
            connection.execute(delete(self.table).where(old))

    def size(self, connection: Connection, queue: str) -> int:
        """How many messages wait in a queue, those not due yet and those taken aside."""
        columns = self.table.c
        waiting = (columns.queue == queue) & columns.owner.is_(None)
        return int(connection.scalar(select(func.count()).where(waiting)) or 0)

    def purge(self, connection: Connection, queue: str) -> int:
        """Delete what waits in a queue; returns how many messages that were."""
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
        """Let a queue have what is sent to an exchange; by name alone, declare it.

        With an *owner* the binding, and a queue declared so, go when that taker is gone. What is
        there already stays whose it is, unless the owner *takes_over*.
        """
        table = self.tables.bindings
        key = {"exchange": exchange, "routing_key": routing_key or "", "queue": queue}
        if not self.dialect.insert_once(connection, table, {**key, "owner": owner}) and takes_over:
            is_it = [table.c[name] == value for name, value in key.items()]
            connection.execute(update(table).where(*is_it).values(owner=owner))

    def unbind(self, connection: Connection, queue: str, exchange: str, routing_key: str) -> None:
        """Take a binding back. Repeating it is harmless."""
        columns = self.tables.bindings.c
        is_it = (columns.exchange == exchange, columns.routing_key == routing_key)
        connection.execute(delete(self.tables.bindings).where(columns.queue == queue, *is_it))

    def bindings(self, connection: Connection, exchange: str) -> Sequence[Row[Any, Any]]:
        """Routing key and queue of all bindings of an exchange."""
        columns = self.tables.bindings.c
        query = select(columns.routing_key, columns.queue).where(columns.exchange == exchange)
        return connection.execute(query).all()

    def exists(self, connection: Connection, queue: str) -> bool:
        """Whether a queue was declared, and was not deleted since."""
        columns = self.tables.bindings.c
        found = select(columns.queue).where(columns.queue == queue, columns.exchange == BY_NAME)
        return connection.scalar(found) is not None

    def drop(self, connection: Connection, queues: Collection[str]) -> None:
        """Delete queues with all that is in them, and their bindings."""
        if queues:
            for table in (self.table, self.tables.bindings):
                connection.execute(delete(table).where(table.c.queue.in_(queues)))

    # ── takers ──────────────────────────────────────────────────────────────────────────────

    def register(self, connection: Connection, presence: Presence) -> int:
        """Make a taker of this connection; returns its id. Commits.

        It is there before the others can see it, or they would take it for a dead one.
        """
        values = {"name": presence.name, "at": self.dialect.now()}
        table = self.tables.takers
        taker: int = connection.execute(
            insert(table).values(**values).returning(table.c.id)
        ).scalar_one()
        presence.announce(connection, taker)
        connection.commit()
        return taker

    def absent(self, connection: Connection, engine: Engine, me: int) -> list[int]:
        """Takers that are gone, and have left what they had."""
        return self.dialect.absent(connection, engine, self.tables, me)

    def bury(self, connection: Connection, taker: int) -> set[str]:
        """Give everybody what *taker* had, and drop its private queues.

        Returns:
            The queues that something came back to.
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
        """Let everybody have these messages, and wake who takes from their queues."""
        columns = self.table.c
        statement = update(self.table).where(which).values(owner=None)
        found = lowest(connection.execute(statement.returning(columns.queue, columns.id)).all())
        self.dialect.wake(connection, self.tables, found)
        return set(found)


def _moment(value: Any) -> datetime:
    moment: datetime = datetime.fromisoformat(value) if isinstance(value, str) else value
    return moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment
