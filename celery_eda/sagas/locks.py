"""Semantic locks of sagas, and the queue for each, first come, first served.

Each key has a row with ticket 0 that names the holder and stays when the holder changes. Acquiring
and releasing a lock both lock that row, so that no saga that queues meanwhile is overlooked.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Table, delete, insert, select, update

from celery_eda.databases import Dialect

#: The ticket of the holder. The ticket of a saga in the queue is the id of its waiting record.
HELD = 0


@dataclass(frozen=True)
class SagaLocks:
    """The semantic locks of one database."""

    table: Table
    dialect: Dialect

    def acquire(
        self, connection: Connection, key: str, owner: str, *, saga: str, record: int
    ) -> bool:
        """Acquire *key* for *owner*, or queue one of its sagas for the lock.

        Args:
            connection: of the transition's transaction.
            key: to be locked.
            owner: the id of the outermost saga, which shares its locks with its sub-sagas.
            saga: the id of the saga to wake when the lock is granted.
            record: the id of its record that waits for the lock.

        Returns:
            True if *owner* holds the lock now.
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

    def is_held(self, connection: Connection, key: str, owner: str) -> bool:
        """True if *owner* holds the lock of *key*."""
        columns = self.table.c
        holder = select(columns.owner).where(columns.key == key, columns.place == HELD)
        return bool(connection.scalar(holder) == owner)

    def release(self, connection: Connection, owner: str) -> list[tuple[str, int]]:
        """Release all locks of *owner*, and remove it from all queues.

        Returns:
            The ids of the sagas that hold one of the locks now, and of their waiting records.
        """
        columns = self.table.c
        keys = select(columns.key).where(columns.owner == owner).distinct()
        granted = []
        for key in sorted(connection.scalars(keys)):
            held = (columns.key == key, columns.place == HELD)
            holder = connection.scalar(select(columns.owner).where(*held).with_for_update())
            queued = (columns.key == key, columns.owner == owner, columns.place != HELD)
            connection.execute(delete(self.table).where(*queued))
            if holder == owner and (following := self._grant_next(connection, key)) is not None:
                granted.append(following)
        return granted

    def _grant_next(self, connection: Connection, key: str) -> tuple[str, int] | None:
        """Grant *key*, whose row is locked, to the first saga in the queue, if there is one."""
        columns = self.table.c
        held = (columns.key == key, columns.place == HELD)
        queue = select(self.table).where(columns.key == key, columns.place != HELD)
        first = connection.execute(queue.order_by(columns.place).limit(1)).one_or_none()
        if first is None:
            connection.execute(delete(self.table).where(*held))
            return None
        ticket = (columns.key == key, columns.place == first.place)
        connection.execute(delete(self.table).where(*ticket))
        holder = {"owner": first.owner, "saga": first.saga}
        connection.execute(update(self.table).where(*held).values(holder))
        return first.saga, first.place
