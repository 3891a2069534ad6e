"""SQLite as the broker: whoever only looks must not wait for the write lock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Executable,
    Row,
    Select,
    Table,
    bindparam,
    delete,
    insert,
    select,
    update,
)

from celery_eda.dialects.base import Values
from celery_eda.dialects.queueing import Passed, Presence, Queueing, in_order
from celery_eda.dialects.sqlite_presence import (
    Doorbell,
    file_of,
    folder_of,
    is_gone,
    refuse_remote,
    ring_all,
)
from celery_eda.dialects.statements import made_once
from celery_eda.tables import Tables


class SQLiteQueueing(Queueing):
    """Nothing dead is left in the way of a claim here, so that nothing has to be passed."""

    glance = 0.25

    def queueing(self, url: URL) -> Queueing:
        refuse_remote(file_of(url))
        return self

    def presence(self, engine: Engine, tables: Tables, heartbeat: float | None) -> Presence:
        return Doorbell(folder_of(engine, tables))

    def absent(self, connection: Connection, engine: Engine, tables: Tables, me: int) -> list[int]:
        folder, takers = folder_of(engine, tables), tables.takers
        others = connection.execute(select(takers.c.id, takers.c.name).where(takers.c.id != me))
        return [row.id for row in others.all() if is_gone(folder, row.name)]

    def ring(self, engine: Engine, tables: Tables) -> None:
        ring_all(folder_of(engine, tables))

    def _insert_into_queues(
        self, connection: Connection, table: Table, now: Any, rows: Sequence[Values]
    ) -> Sequence[Row[Any]]:
        connection.execute(insert(table).values(at=now), rows)
        return ()  # nobody is told which

    def lease(
        self,
        connection: Connection,
        table: Table,
        queue: str,
        taker: int,
        room: int,
        passed: Passed,
    ) -> Sequence[Row[Any]]:
        looking, leasing, _ = self._takings(table)
        return self._found(connection, looking, leasing, its_queue=queue, room=room, taker=taker)

    def take(
        self, connection: Connection, table: Table, queue: str, room: int, passed: Passed
    ) -> Sequence[Row[Any]]:
        looking, _, taking = self._takings(table)
        return self._found(connection, looking, taking, its_queue=queue, room=room)

    def _found(
        self, connection: Connection, looking: Executable, taking: Executable, **parameters: Any
    ) -> Sequence[Row[Any]]:
        if not connection.scalar(looking, {**parameters, "room": 1}):
            return []
        return in_order(connection.execute(taking, parameters).all())

    @made_once
    def _takings(self, table: Table) -> tuple[Executable, ...]:
        """What looks for messages, leases them, and takes them for good."""
        columns = table.c
        waiting: Select[Any] = (
            select(columns.id)
            .where(
                columns.queue == bindparam("its_queue"),
                columns.owner.is_(None),
                columns.expires_at.is_(None) | (columns.expires_at > self.now()),
            )
            .order_by(columns.rank, columns.id)
            .limit(bindparam("room"))
        )
        first = columns.id.in_(waiting)
        values = {"owner": bindparam("taker"), "fence": columns.fence + 1}
        return (
            waiting,
            update(table).where(first).values(values).returning(*columns),
            delete(table).where(first).returning(*columns),
        )
