"""The statements that move messages through queues in a database which is the broker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

from sqlalchemy import (
    ColumnElement,
    Connection,
    Delete,
    Engine,
    Executable,
    Row,
    Table,
    bindparam,
    delete,
    insert,
    select,
    update,
)

from celery_eda.databases import Dialect, Tables, Values, cached_statement

#: Ranks of messages: 0 comes first; within a rank, the lowest id does.
RANKS = 10
#: The owner of a message that is not due yet.
NOT_DUE = 0
#: For each rank, the id up to which nothing is left to claim.
Passed = Sequence[int]


class Presence(Protocol):
    """Proof that a taker is alive, given by the kernel or the server, and its wake-up channel.

    It ends with its process, however that process ends, and needs no clock.
    """

    #: Unique among all takers.
    name: str

    def announce(self, connection: Connection, taker: int) -> None:
        """Become the presence of *taker*, before this transaction makes the taker visible."""
        ...

    def fileno(self) -> int:
        """The descriptor that becomes readable when there may be something to claim."""
        ...

    def woken(self) -> Mapping[str, int] | None:
        """The queues that the taker was woken for, each with the lowest id to claim there.

        None if the taker was woken without being given a queue. Never waits.

        Raises:
            OSError: the presence has ended.
        """
        ...

    def missed(self, connection: Connection) -> bool:
        """True if another process has written without waking this taker."""
        ...

    def disown(self) -> None:
        """Leave the presence to the parent process; for a child that has just been forked."""
        ...

    def end(self) -> None:
        """End the presence. Repeating it is harmless."""
        ...


class Queueing:
    """The statements of the queues. Every method leaves the commit to the caller.

    Args:
        dialect: the statements that a service and a broker need of the same database.
    """

    #: Seconds between two polls for changes that no wake-up announces.
    poll_interval = 1.0

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self.statements: dict[Any, Any] = {}

    # ── takers ──────────────────────────────────────────────────────────────────────────────

    def presence(self, engine: Engine, tables: Tables, heartbeat: float | None) -> Presence:
        """A presence for a new taker.

        With a *heartbeat*, in seconds, the taker itself renews its presence, and one that has
        been silent for so long counts as dead: for databases behind a pooler, where nothing that
        belongs to a session lasts.
        """
        raise NotImplementedError

    def dead_takers(
        self, connection: Connection, engine: Engine, tables: Tables, me: int
    ) -> list[int]:
        """Takers other than *me* that are dead; no other process gets the same ones meanwhile."""
        raise NotImplementedError

    def wake(self, connection: Connection, tables: Tables, lowest: Mapping[str, int]) -> None:
        """Wake the takers of these queues as soon as this transaction commits.

        Each queue comes with the *lowest* id that can be claimed from then on.
        """

    def wake_all(self, engine: Engine, tables: Tables) -> None:
        """Wake every taker, after a transaction has committed. Never waits, never fails."""

    # ── messages ────────────────────────────────────────────────────────────────────────────

    def enqueue(self, connection: Connection, tables: Tables, messages: Sequence[Values]) -> None:
        """Put *messages* into their queues, in this order, and wake the takers of those queues.

        Each has the columns ``queue``, ``rank``, ``message`` and ``body``, and in seconds the
        ``delay`` until it is due and the ``lifetime`` until it is dropped; None for neither.
        """
        now: Any = self.dialect.now()
        if any(each["delay"] is not None or each["lifetime"] is not None for each in messages):
            now = connection.scalar(select(now))
        rows = [_timed(each, now) for each in messages]
        inserted = self._insert_into_queues(connection, tables.queue, now, rows)
        self.wake(connection, tables, lowest(inserted))

    def _insert_into_queues(
        self, connection: Connection, table: Table, now: Any, rows: Sequence[Values]
    ) -> Sequence[Row[Any]]:
        """Insert *rows*; returns the queue and the id of each."""
        returned = (table.c.queue, table.c.id)
        statement = insert(table).values(at=now).returning(*returned, sort_by_parameter_order=True)
        return connection.execute(statement, rows).all()

    def lease(
        self,
        connection: Connection,
        table: Table,
        queue: str,
        taker: int,
        room: int,
        passed: Passed,
    ) -> Sequence[Row[Any]]:
        """Lease up to *room* messages of a queue to *taker*, in their order.

        Messages up to the ids *passed* may be left out.
        """
        parameters = {"its_queue": queue, "room": room, "taker": taker}
        return _in_order(self._claim(connection, table, self._leasing(table), parameters, passed))

    def take(
        self, connection: Connection, table: Table, queue: str, room: int, passed: Passed
    ) -> Sequence[Row[Any]]:
        """Delete up to *room* messages of a queue and return them, in their order.

        Messages up to the ids *passed* may be left out.
        """
        parameters = {"its_queue": queue, "room": room}
        return _in_order(self._claim(connection, table, self._taking(table), parameters, passed))

    def _claim(
        self,
        connection: Connection,
        table: Table,
        statement: Executable,
        parameters: Values,
        passed: Passed,
    ) -> Sequence[Row[Any]]:
        """The rows that *statement* leases or deletes."""
        raise NotImplementedError

    @cached_statement
    def _leasing(self, table: Table) -> Executable:
        values = {"owner": bindparam("taker"), "fence": table.c.fence + 1}
        return update(table).where(self._is_first(table)).values(values).returning(*table.c)

    @cached_statement
    def _taking(self, table: Table) -> Executable:
        return delete(table).where(self._is_first(table)).returning(*table.c)

    def _is_first(self, table: Table) -> ColumnElement[bool]:
        """True for the first messages of a queue that can be claimed.

        The queue is the parameter ``its_queue``; ``room`` limits the number of messages.
        """
        raise NotImplementedError

    def _can_be_claimed(self, table: Table) -> ColumnElement[bool]:
        """True for messages of the queue ``its_queue`` that are due, free and not expired."""
        columns = table.c
        return (
            (columns.queue == bindparam("its_queue"))
            & columns.owner.is_(None)
            & (columns.expires_at.is_(None) | (columns.expires_at > self.dialect.now()))
        )

    def complete(self, connection: Connection, table: Table, leases: Sequence[Values]) -> None:
        """Delete the messages with this ``id`` and ``fence``; a message leased again stays."""
        connection.execute(
            self._completing(table),
            [{f"its_{name}": value for name, value in each.items()} for each in leases],
        )

    @cached_statement
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


def _in_order(rows: Sequence[Row[Any]]) -> Sequence[Row[Any]]:
    """Messages in the order of delivery: RETURNING promises none."""
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
