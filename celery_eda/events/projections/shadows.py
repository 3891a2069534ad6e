"""Shadows: tables that are built beside the live tables of projections, to be swapped in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sqlalchemy import ColumnElement, Connection, Table, select, update

from celery_eda.databases import Dialect


class Shadow(str, Enum):
    """The kind of a shadow: ``following`` the live table, or ``frozen`` at a time in the past."""

    following = "following"
    frozen = "frozen"


@dataclass(frozen=True)
class Shadows:
    """The projections in one database that have a shadow; one row for each projection."""

    table: Table
    dialect: Dialect

    def share(self, connection: Connection, name: str) -> Shadow | None:
        """Return the shadow of a projection, which cannot change before the transaction ends."""
        self.dialect.stop_writers(connection)
        return self._locked(connection, name, read=True)

    def lock(self, connection: Connection, name: str) -> Shadow | None:
        """Return the shadow of a projection, which handles no event before the transaction ends."""
        self.dialect.stop_writers(connection)
        return self._locked(connection, name, read=False)

    def find(self, connection: Connection, name: str) -> Shadow | None:
        """Return the shadow of a projection, without a lock."""
        shadow = connection.scalar(select(self.table.c.shadow).where(self._is(name)))
        return None if shadow is None else Shadow(shadow)

    def set(self, connection: Connection, name: str, shadow: Shadow | None) -> None:
        """Record the shadow of a projection; None if there is none any more."""
        value = None if shadow is None else shadow.value
        connection.execute(update(self.table).where(self._is(name)).values(shadow=value))

    def _locked(self, connection: Connection, name: str, *, read: bool) -> Shadow | None:
        query = select(self.table.c.shadow).where(self._is(name)).with_for_update(read=read)
        row = connection.execute(query).one_or_none()
        if row is None:
            self.dialect.insert_once(connection, self.table, {"name": name})
            row = connection.execute(query).one()
        return None if row.shadow is None else Shadow(row.shadow)

    def _is(self, name: str) -> ColumnElement[bool]:
        return self.table.c.name == name
