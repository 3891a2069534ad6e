"""What the database's queues need of it where it is the broker itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

from sqlalchemy import (
    URL,
    Connection,
    Delete,
    Engine,
    Row,
    Table,
    bindparam,
    delete,
    insert,
    select,
)

from celery_eda.dialects.base import Dialect, Values
from celery_eda.dialects.statements import made_once
from celery_eda.tables import Tables

#: Ranks of messages: 0 comes first, and of one rank the lowest id.
RANKS = 10
#: The owner of a message whose time has not come.
NOT_DUE = 0
#: For each rank the id up to which there is nothing to take.
Passed = Sequence[int]


class Presence(Protocol):
    """That a taker is there, as the kernel or the server knows it, and how it is woken.

    It ends with its process, however that ends, and needs no clock.
    """

    #: Distinguishes it from all others.
    name: str

    def announce(self, connection: Connection, taker: int) -> None:
        """Be there as *taker*, before this transaction tells others of it."""
        ...

    def fileno(self) -> int:
        """What becomes readable when there may be something to take."""
        ...

    def woken(self) -> Mapping[str, int] | None:
        """The queues that it was woken for, with the lowest id that can be taken there.

        None if it was woken, and nobody knows for which. Never waits.

        Raises:
            OSError: it is there no more.
        """
        ...

    def missed(self, connection: Connection) -> bool:
        """Whether somebody has written without waking it."""
        ...

    def disown(self) -> None:
        """Leave it to the parent, in a child that has just been forked."""
        ...

    def end(self) -> None:
        """Be gone. Repeating it is harmless."""
        ...


class Queueing(Dialect):
    """The statements of the queues. Every method leaves the commit to the caller."""

    #: Seconds between two looks of a taker at what nobody has told it.
    glance = 1.0

    def queueing(self, url: URL) -> Queueing:
        return self

    def presence(self, engine: Engine, tables: Tables, heartbeat: float | None) -> Presence:
        """What tells the others that a taker is there.

        With a *heartbeat* that is the taker itself, and whoever is silent for so many seconds is
        taken for gone; for where nothing of a session lasts.
        """
        raise NotImplementedError

    def absent(self, connection: Connection, engine: Engine, tables: Tables, me: int) -> list[int]:
        """The takers that are there no more, *me* aside; nobody else gets them meanwhile."""
        raise NotImplementedError

    def enqueue(self, connection: Connection, tables: Tables, messages: Sequence[Values]) -> None:
        """Put *messages* into their queues, in this order, and wake who takes from those.

        Each has the columns ``queue``, ``rank``, ``message`` and ``body``, and the seconds
        ``delay`` until it is due and ``lifetime`` until it is dropped, both None if there are none.
        """
        now: Any = self.now()
        if any(each["delay"] is not None or each["lifetime"] is not None for each in messages):
            now = connection.scalar(select(now))
        rows = [_timed(each, now) for each in messages]
        found = self._insert_into_queues(connection, tables.queue, now, rows)
        self.wake(connection, tables, lowest(found))

    def _insert_into_queues(
        self, connection: Connection, table: Table, now: Any, rows: Sequence[Values]
    ) -> Sequence[Row[Any]]:
        """Insert *rows*; returns queue and id of each."""
        of = (table.c.queue, table.c.id)
        statement = insert(table).values(at=now).returning(*of, sort_by_parameter_order=True)
        return connection.execute(statement, rows).all()

    def wake(self, connection: Connection, tables: Tables, lowest: Mapping[str, int]) -> None:
        """Wake who takes from these queues, once this transaction commits.

        Each comes with the *lowest* id of what can be taken from then on.
        """

    def ring(self, engine: Engine, tables: Tables) -> None:
        """Wake everybody, now that a transaction has committed. Never waits, never fails."""

    def lease(
        self,
        connection: Connection,
        table: Table,
        queue: str,
        taker: int,
        room: int,
        passed: Passed,
    ) -> Sequence[Row[Any]]:
        """Let *taker* have up to *room* messages of a queue, in their order.

        Only those are looked for that are behind the ids *passed*.
        """
        raise NotImplementedError

    def take(
        self, connection: Connection, table: Table, queue: str, room: int, passed: Passed
    ) -> Sequence[Row[Any]]:
        """Delete up to *room* messages of a queue, and return them in their order, likewise."""
        raise NotImplementedError

    def complete(self, connection: Connection, table: Table, leases: Sequence[Values]) -> None:
        """Delete the messages whose ``id`` and ``fence`` are given; the others' stay."""
        connection.execute(
            self._completing(table),
            [{f"its_{name}": value for name, value in each.items()} for each in leases],
        )

    @made_once
    def _completing(self, table: Table) -> Delete:
        columns = table.c
        its = (columns.id == bindparam("its_id"), columns.fence == bindparam("its_fence"))
        return delete(table).where(*its)


def lowest(rows: Sequence[Row[Any]]) -> dict[str, int]:
    """The lowest id of each queue, of *rows* with a queue and an id."""
    found: dict[str, int] = {}
    for row in rows:
        found[row.queue] = min(row.id, found.get(row.queue, row.id))
    return found


def in_order(rows: Sequence[Row[Any]]) -> Sequence[Row[Any]]:
    """Messages as they are to be taken."""
    return sorted(rows, key=lambda row: (row.rank, row.id))


def _timed(message: Values, now: Any) -> dict[str, Any]:
    """The row of a *message*, with times instead of seconds."""
    row = dict(message)
    delay, lifetime = row.pop("delay"), row.pop("lifetime")
    later = delay is not None and delay > 0
    return {
        **row,
        "due": now + timedelta(seconds=delay) if later else None,
        "owner": NOT_DUE if later else None,
        "expires_at": None if lifetime is None else now + timedelta(seconds=lifetime),
    }
