"""What databases share that know ``INSERT … ON CONFLICT … RETURNING``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Table

from celery_eda.dialects.base import Dialect, Values


class Upserting(Dialect):
    """A database that inserts a row, or else changes the one that is there, in one statement."""

    #: SQLAlchemy's ``insert`` for this database.
    insert: Callable[[Table], Any]

    def insert_once(self, connection: Connection, table: Table, values: Values) -> bool:
        # Not rowcount: SQLAlchemy keeps none for an INSERT.
        key = next(iter(table.primary_key))
        statement = self.insert(table).values(**values).on_conflict_do_nothing().returning(key)
        return connection.execute(statement).first() is not None

    def _move_on(
        self, connection: Connection, table: Table, rows: Sequence[Values]
    ) -> Sequence[Row[Any]]:
        fresh = self.insert(table).values(rows)
        statement = fresh.on_conflict_do_update(
            index_elements=list(table.primary_key),
            set_={"last": table.c.last + fresh.excluded.last},
        )
        return connection.execute(statement.returning(*table.c)).all()
