"""PostgreSQL as the broker: each claim begins behind what has been taken.

What is leased and deleted stays in the index of what waits as long as some transaction may still
see it, and a claim would pass all of that before the first message.
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
    Integer,
    Row,
    Table,
    bindparam,
    case,
    cast,
    delete,
    func,
    select,
    true,
    tuple_,
    update,
)

from celery_eda.dialects.base import Values
from celery_eda.dialects.postgresql_heartbeat import Beating
from celery_eda.dialects.postgresql_presence import Listening, channel_of, key_of, note_of
from celery_eda.dialects.queueing import NOT_DUE, Passed, Presence, Queueing, in_order
from celery_eda.dialects.statements import made_once, quoted
from celery_eda.tables import Tables

#: The columns of a message that waits, and their types.
_COLUMNS = {
    "queue": "text", "rank": "int4", "message": "text", "body": "bytea",
    "delay": "float8", "lifetime": "float8",
}  # fmt: skip


class PostgreSQLQueueing(Queueing):
    """Takers are told with its id what can be taken, so that they know where to begin."""

    def presence(self, engine: Engine, tables: Tables, heartbeat: float | None) -> Presence:
        return Listening(tables) if heartbeat is None else Beating(engine, tables, heartbeat)

    def absent(self, connection: Connection, engine: Engine, tables: Tables, me: int) -> list[int]:
        takers = tables.takers.c
        # The lock is free once the connection that held it is gone, and ours until the commit.
        free = func.pg_try_advisory_xact_lock(key_of(tables), cast(takers.id, Integer))
        gone = case((takers.lease.is_(None), free), else_=takers.at < _ago(takers.lease))
        return list(connection.scalars(select(takers.id).where(takers.id != me, gone)))

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

    @made_once
    def _enqueueing_one(self, tables: Tables) -> str:
        values = ", ".join(f"%b::{kind}" for kind in _COLUMNS.values())
        return _enqueued(tables, f"(VALUES ({values}, 1))")

    @made_once
    def _enqueueing(self, tables: Tables) -> str:
        arrays = ", ".join(f"%b::{kind}[]" for kind in _COLUMNS.values())
        return _enqueued(tables, f"unnest({arrays}) WITH ORDINALITY")

    def wake(self, connection: Connection, tables: Tables, lowest: Mapping[str, int]) -> None:
        channel = channel_of(tables)
        for queue, id_ in lowest.items():
            connection.execute(select(func.pg_notify(channel, note_of(queue, id_))))

    def lease(
        self,
        connection: Connection,
        table: Table,
        queue: str,
        taker: int,
        room: int,
        passed: Passed,
    ) -> Sequence[Row[Any]]:
        leasing, _ = self._takings(table)
        parameters = {"its_queue": queue, "room": room, "passed": list(passed), "taker": taker}
        return in_order(self.execute(connection, leasing, parameters).all())

    def take(
        self, connection: Connection, table: Table, queue: str, room: int, passed: Passed
    ) -> Sequence[Row[Any]]:
        _, taking = self._takings(table)
        parameters = {"its_queue": queue, "room": room, "passed": list(passed)}
        return in_order(self.execute(connection, taking, parameters).all())

    @made_once
    def _takings(self, table: Table) -> tuple[Any, ...]:
        """What leases messages, and what takes them for good."""
        columns = table.c
        place = (
            func.unnest(bindparam("passed", type_=ARRAY(BigInteger)))
            .table_valued("id", with_ordinality="number", name="place")
            .render_derived()
        )
        rank = cast(place.c.number, Integer) - 1
        room = bindparam("room", type_=Integer)
        # Rank and id are compared together, and ordered by both though there is one rank, so that
        # nothing but the index of what waits has this order, and is entered at the place.
        of_a_rank = (
            select(columns.id)
            .where(
                columns.queue == bindparam("its_queue"),
                tuple_(columns.rank, columns.id) > tuple_(rank, place.c.id),
                columns.rank <= rank,
                columns.owner.is_(None),
                columns.expires_at.is_(None) | (columns.expires_at > self.now()),
            )
            .order_by(columns.rank, columns.id)
            .limit(room)
            .with_for_update(skip_locked=True)
            .lateral("of_a_rank")
        )
        first = select(of_a_rank.c.id).select_from(place.join(of_a_rank, true())).limit(room)
        # Without MATERIALIZED the limit would be applied anew for every row that is locked.
        ready = first.cte("ready").prefix_with("MATERIALIZED")
        is_ready = columns.id == ready.c.id
        values = {"owner": bindparam("taker"), "fence": columns.fence + 1}
        return (
            update(table).where(is_ready).values(values).returning(*columns),
            delete(table).where(is_ready).returning(*columns),
        )

    def complete(self, connection: Connection, table: Table, leases: Sequence[Values]) -> None:
        if connection.dialect.driver != "psycopg":
            super().complete(connection, table, leases)
            return
        of = [[each[name] for each in leases] for name in ("id", "fence")]
        connection.exec_driver_sql(self._completing_all(table), tuple(of))

    @made_once
    def _completing_all(self, table: Table) -> str:
        return (
            f"DELETE FROM {quoted(table)} AS queue USING unnest(%b::int8[], %b::int4[]) "
            "AS its(id, fence) WHERE queue.id = its.id AND queue.fence = its.fence"
        )


def _enqueued(tables: Tables, source: str) -> str:
    """Inserts what *source* has, and tells it to who takes from those queues."""
    later = "clock_timestamp() + make_interval(secs => {})"
    return (
        f"WITH put AS (INSERT INTO {quoted(tables.queue)} "
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
