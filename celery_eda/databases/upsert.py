"""The statements of databases with ``INSERT … ON CONFLICT … RETURNING``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Table

from celery_eda.databases.dialect import Dialect, Values
from celery_eda.databases.statements import cached_statement


class Upserting(Dialect):
    """A database that inserts a row, or updates the existing one, in one statement."""

    #: SQLAlchemy's ``insert`` for this database.
    insert: Callable[[Table], Any]

    def insert_once(
        self, connection: Connection, table: Table, values: Values, now: str | None = None
    ) -> bool:
        # Not rowcount: SQLAlchemy keeps none for an INSERT.
        return connection.execute(self._inserting(table, now), values).first() is not None

    @cached_statement
    def _inserting(self, table: Table, now: str | None) -> Any:
        clock = {now: self.now()} if now else {}
        key = next(iter(table.primary_key))
        return self.insert(table).values(clock).on_conflict_do_nothing().returning(key)

    def _advance(
        self, connection: Connection, table: Table, rows: Sequence[Values]
    ) -> Sequence[Row[Any]]:
        return connection.execute(self._advancing(table), rows).all()

    @cached_statement
    def _advancing(self, table: Table) -> Any:
        fresh = self.insert(table).values(epoch=self.milliseconds())
        statement = fresh.on_conflict_do_update(
            index_elements=list(table.primary_key),
            set_={
                "last": table.c.last + fresh.excluded.last,
                "version": table.c.version + fresh.excluded.version,
            },
        )
        return statement.returning(*table.c)
