"""PostgreSQL as the broker: each claim begins behind the messages that have been claimed.

Leased and deleted messages stay in the index of free messages as long as any transaction may still
see them, and a claim that began at the start would pass all of them before the first message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Integer,
    Row,
    Table,
    bindparam,
    case,
    cast,
    func,
    select,
    true,
    tuple_,
)

from celery_eda.brokers.database.postgresql_heartbeat import Heartbeat
from celery_eda.brokers.database.postgresql_presence import Listening, channel_of, key_of, note_of
from celery_eda.brokers.database.queueing import NOT_DUE, Passed, Presence, Queueing
from celery_eda.databases import Tables, Values, cached_statement, quoted_name

#: The columns of a message in a queue, and their types.
_COLUMNS = {
    "queue": "text",
    "rank": "int4",
    "message": "text",
    "body": "bytea",
    "delay": "float8",
    "lifetime": "float8",
}


class PostgreSQLQueues(Queueing):
    """The statements of queues in PostgreSQL.

    A wake-up carries the id of the message, so that takers know where to begin.
    """

    def presence(self, engine: Engine, tables: Tables, heartbeat: float | None) -> Presence:
        return Listening(tables) if heartbeat is None else Heartbeat(engine, tables, heartbeat)

    def dead_takers(
        self, connection: Connection, engine: Engine, tables: Tables, me: int
    ) -> list[int]:
        takers = tables.takers.c
        # A dead taker's lock is free, since its connection is gone, and is ours until the commit.
        free = func.pg_try_advisory_xact_lock(key_of(tables), cast(takers.id, Integer))
        is_dead = case((takers.lease.is_(None), free), else_=takers.at < _ago(takers.lease))
        return list(connection.scalars(select(takers.id).where(takers.id != me, is_dead)))

    def wake(self, connection: Connection, tables: Tables, lowest: Mapping[str, int]) -> None:
        channel = channel_of(tables)
        for queue, id_ in lowest.items():
            connection.execute(select(func.pg_notify(channel, note_of(queue, id_))))

    def enqueue(self, connection: Connection, tables: Tables, messages: Sequence[Values]) -> None:
        if connection.dialect.driver != "psycopg":
            super().enqueue(connection, tables, messages)
            return
        if len(messages) == 1:
            statement = self._enqueueing_one(tables)
            values: Any = [messages[0][name] for name in _COLUMNS]
        else:
            statement = self._enqueueing(tables)
            values = [[each[name] for each in messages] for name in _COLUMNS]
        connection.exec_driver_sql(statement, tuple(values))

    @cached_statement
    def _enqueueing_one(self, tables: Tables) -> str:
        values = ", ".join(f"%b::{kind}" for kind in _COLUMNS.values())
        return _enqueued(tables, f"(VALUES ({values}, 1))")

    @cached_statement
    def _enqueueing(self, tables: Tables) -> str:
        arrays = ", ".join(f"%b::{kind}[]" for kind in _COLUMNS.values())
        return _enqueued(tables, f"unnest({arrays}) WITH ORDINALITY")

    def _claim(
        self,
        connection: Connection,
        table: Table,
        statement: Executable,
        parameters: Values,
        passed: Passed,
    ) -> Sequence[Row[Any]]:
        bounds = {"passed": list(passed)}
        return self.dialect.execute(connection, statement, {**parameters, **bounds}).all()

    def _is_first(self, table: Table) -> ColumnElement[bool]:
        columns = table.c
        bound = (
            func.unnest(bindparam("passed", type_=ARRAY(BigInteger)))
            .table_valued("id", with_ordinality="number", name="bound")
            .render_derived()
        )
        rank = cast(bound.c.number, Integer) - 1
        room = bindparam("room", type_=Integer)
        # Rank and id are compared together, and ordered by both though there is one rank: so only
        # the index of free messages has this order, and the scan of it begins at the bound.
        of_a_rank = (
            select(columns.id)
            .where(
                self._can_be_claimed(table),
                tuple_(columns.rank, columns.id) > tuple_(rank, bound.c.id),
                columns.rank <= rank,
            )
            .order_by(columns.rank, columns.id)
            .limit(room)
            .with_for_update(skip_locked=True)
            .lateral("of_a_rank")
        )
        first = select(of_a_rank.c.id).select_from(bound.join(of_a_rank, true())).limit(room)
        # Without MATERIALIZED the limit would be applied again for every row that is locked.
        ready = first.cte("ready").prefix_with("MATERIALIZED")
        return columns.id == ready.c.id

    def complete(self, connection: Connection, table: Table, leases: Sequence[Values]) -> None:
        if connection.dialect.driver != "psycopg":
            super().complete(connection, table, leases)
            return
        arrays = [[each[name] for each in leases] for name in ("id", "fence")]
        connection.exec_driver_sql(self._completing_all(table), tuple(arrays))

    @cached_statement
    def _completing_all(self, table: Table) -> str:
        return (
            f"DELETE FROM {quoted_name(table)} AS queue USING unnest(%b::int8[], %b::int4[]) "
            "AS its(id, fence) WHERE queue.id = its.id AND queue.fence = its.fence"
        )


def _enqueued(tables: Tables, source: str) -> str:
    """The statement that inserts the messages of *source* and notifies the takers of each queue."""
    later = "clock_timestamp() + make_interval(secs => {})"
    return (
        f"WITH put AS (INSERT INTO {quoted_name(tables.queue)} "
        "(queue, rank, message, body, due, owner, expires_at, at) "
        f"SELECT queue, rank, message, body, {later.format('delay')}, "
        f"CASE WHEN delay > 0 THEN {NOT_DUE} END, {later.format('lifetime')}, clock_timestamp() "
        f"FROM {source} AS it({', '.join(_COLUMNS)}, position) "
        "ORDER BY position RETURNING queue, id) "
        f"SELECT pg_notify('{channel_of(tables)}', min(id) || ' ' || queue) "
        "FROM put GROUP BY queue"
    )


def _ago(seconds: Any) -> ColumnElement[Any]:
    return func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, seconds)
