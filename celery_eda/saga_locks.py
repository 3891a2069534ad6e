"""What sagas have locked for others, and who waits for it, in the order in which they came.

The row at place 0 of a key says who has it, and stays when that changes. Whoever comes or goes has
it locked meanwhile, so that nobody in line is overlooked.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Table, delete, insert, select, update

from celery_eda.dialects.base import Dialect

#: The place of whoever has the lock; those who wait stand at the ids of their records.
HELD = 0


@dataclass(frozen=True)
class SagaLocks:
    """The semantic locks of one database; all in the caller's transaction."""

    table: Table
    dialect: Dialect

    def take(self, connection: Connection, key: str, owner: str, *, saga: str, record: int) -> bool:
        """Take *key* for *owner*, or have one of its sagas wait for it.

        Args:
            connection: of the transition's transaction.
            key: what is to be locked.
            owner: the outermost saga, whose parts share what it has.
            saga: the one that is told of it once it is free.
            record: likewise.

        Returns:
            Whether it has it now.
        """
        columns = self.table.c
        held = select(columns.owner).where(columns.key == key, columns.place == HELD)
        row = {"key": key, "owner": owner, "saga": saga}
        while (holder := connection.scalar(held.with_for_update())) is None:
            if self.dialect.insert_once(connection, self.table, {**row, "place": HELD}):
                return True
        if holder != owner:
            connection.execute(insert(self.table).values(place=record, **row))
        return bool(holder == owner)

    def release(self, connection: Connection, owner: str) -> list[tuple[str, int]]:
        """Let go of all that *owner* has or waits for; the next in line has it then.

        Returns:
            The sagas that have got a lock by that, and the records that waited for it.
        """
        columns = self.table.c
        keys = select(columns.key).where(columns.owner == owner).distinct()
        heirs = []
        for key in sorted(connection.scalars(keys)):
            held = (columns.key == key, columns.place == HELD)
            holder = connection.scalar(select(columns.owner).where(*held).with_for_update())
            mine = (columns.key == key, columns.owner == owner, columns.place != HELD)
            connection.execute(delete(self.table).where(*mine))
            if holder == owner and (heir := self._pass_on(connection, key)) is not None:
                heirs.append(heir)
        return heirs

    def _pass_on(self, connection: Connection, key: str) -> tuple[str, int] | None:
        """Give *key*, whose row is locked, to the next in line, if there is one."""
        columns = self.table.c
        held = (columns.key == key, columns.place == HELD)
        waiting = select(self.table).where(columns.key == key, columns.place != HELD)
        heir = connection.execute(waiting.order_by(columns.place).limit(1)).one_or_none()
        if heir is None:
            connection.execute(delete(self.table).where(*held))
            return None
        line = (columns.key == key, columns.place == heir.place)
        connection.execute(delete(self.table).where(*line))
        connection.execute(update(self.table).where(*held).values(owner=heir.owner, saga=heir.saga))
        return heir.saga, heir.place
