"""SQLite as the broker: a taker that finds no message does not wait for the write lock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Row,
    Select,
    Table,
    bindparam,
    insert,
    select,
)

from celery_eda.brokers.database.queueing import Passed, Presence, Queueing
from celery_eda.brokers.database.sqlite_presence import LockedPipe, folder_of, is_gone, wake_all
from celery_eda.databases import Tables, Values, cached_statement


class SQLiteQueues(Queueing):
    """The statements of queues in SQLite.

    SQLite leaves no dead rows in an index, so that a claim has none to pass.
    """

    poll_interval = 0.25

    def presence(self, engine: Engine, tables: Tables, heartbeat: float | None) -> Presence:
        return LockedPipe(folder_of(engine, tables))

    def dead_takers(
        self, connection: Connection, engine: Engine, tables: Tables, me: int
    ) -> list[int]:
        folder, takers = folder_of(engine, tables), tables.takers
        others = connection.execute(select(takers.c.id, takers.c.name).where(takers.c.id != me))
        return [row.id for row in others.all() if is_gone(folder, row.name)]

    def wake_all(self, engine: Engine, tables: Tables) -> None:
        wake_all(folder_of(engine, tables))

    def _insert_into_queues(
        self, connection: Connection, table: Table, now: Any, rows: Sequence[Values]
    ) -> Sequence[Row[Any]]:
        connection.execute(insert(table).values(at=now), rows)
        return ()  # a wake-up carries no ids here

    def _claim(
        self,
        connection: Connection,
        table: Table,
        statement: Executable,
        parameters: Values,
        passed: Passed,
    ) -> Sequence[Row[Any]]:
        if not connection.scalar(self._free(table), {**parameters, "room": 1}):
            return []
        return connection.execute(statement, parameters).all()

    def _is_first(self, table: Table) -> ColumnElement[bool]:
        return table.c.id.in_(self._free(table))

    @cached_statement
    def _free(self, table: Table) -> Select[Any]:
        """The ids of messages that can be claimed, in the order of delivery."""
        return (
            select(table.c.id)
            .where(self._can_be_claimed(table))
            .order_by(table.c.rank, table.c.id)
            .limit(bindparam("room"))
        )
