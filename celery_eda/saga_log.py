"""Each saga's state, and what has become of each attempt at each of its parts.

The state and the record of what led to it are written in one transaction, with the commands that
follow. The record is never changed but to say how something has ended: it is the saga's history.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from typing import Any
from uuid import UUID

from kombu.utils import json
from sqlalchemy import Connection, Row, Select, Table, delete, insert, select, update

from celery_eda.dialects.base import Dialect
from celery_eda.errors import SagaError
from celery_eda.saga_record import Kind, Record, Status


class State(str, Enum):
    """Where a saga is. It ends ``completed``, ``compensated`` or ``cancelled``.

    ``parked``: it cannot go on by itself, and waits for a person.
    """

    running = "running"
    compensating = "compensating"
    parked = "parked"
    completed = "completed"
    compensated = "compensated"
    cancelled = "cancelled"

    @property
    def is_end(self) -> bool:
        """Whether nothing follows by itself."""
        return self in (State.completed, State.compensated, State.cancelled)


@dataclass(frozen=True)
class Saga:
    """One instance.

    Attributes:
        name, version: of its definition.
        data: what it knows.
        back: whether it undoes, or did when it was parked.
        cancelled: whether a person has it undone.
        error: why it is parked, or was undone.
        root: of a sub-saga, the saga that it is a part of; the outermost one.
        record: of a sub-saga, the id of the record that waits for its end.
    """

    id: str
    name: str
    version: int
    state: State
    data: Mapping[str, Any]
    back: bool = False
    cancelled: bool = False
    error: str | None = None
    root: str | None = None
    record: int | None = None
    begun_at: datetime | None = None
    changed_at: datetime | None = None


@dataclass(frozen=True)
class Entry:
    """One line of a saga's history: a record, when it began and ended, and who ended it."""

    record: Record
    begun_at: datetime
    ended_at: datetime | None
    due: datetime | None
    who: str | None
    request: UUID | None


@dataclass(frozen=True)
class SagaLog:
    """The sagas of one database.

    Attributes:
        read_error: makes an error of what is written of it.
    """

    sagas: Table
    steps: Table
    dialect: Dialect
    read_error: Callable[[Any], Exception]

    # ── sagas ───────────────────────────────────────────────────────────────────────────────

    def add(self, connection: Connection, saga: Saga) -> bool:
        """Write down a new one; returns False if there is one of that id."""
        values = {
            "id": saga.id,
            "name": saga.name,
            "version": saga.version,
            "root": saga.root,
            **_mutable(saga),
        }
        return self.dialect.insert_once(connection, self.sagas, values, now="begun_at")

    def lock(self, connection: Connection, id: str) -> Saga:
        """One saga, which nobody else changes before this transaction ends.

        Raises:
            SagaError: there is none of that id.
        """
        self.dialect.stop_writers(connection)
        return self._found(connection, id, self._of(id).with_for_update())

    def find(self, connection: Connection, id: str) -> Saga:
        """One saga.

        Raises:
            SagaError: there is none of that id.
        """
        return self._found(connection, id, self._of(id))

    def sub_saga(self, connection: Connection, record: int) -> Saga | None:
        """The one whose end a record waits for."""
        query = select(self.sagas).where(self.sagas.c.record == record)
        row = connection.execute(query).one_or_none()
        return None if row is None else _saga(row)

    def sub_sagas(self, connection: Connection, root: str) -> list[Saga]:
        """All that are parts of one, and parts of parts."""
        query = select(self.sagas).where(self.sagas.c.root == root)
        return [_saga(row) for row in connection.execute(query.order_by(self.sagas.c.begun_at))]

    def select(
        self, connection: Connection, state: State | None, name: str | None, limit: int
    ) -> list[Saga]:
        """Up to *limit* sagas, those that changed last first."""
        columns = self.sagas.c
        query = select(self.sagas).order_by(columns.changed_at.desc()).limit(limit)
        if state is not None:
            query = query.where(columns.state == state.value)
        if name is not None:
            query = query.where(columns.name == name)
        return [_saga(row) for row in connection.execute(query)]

    def save(self, connection: Connection, saga: Saga) -> None:
        """Write down its state."""
        values = {**_mutable(saga), "changed_at": self.dialect.now()}
        connection.execute(update(self.sagas).where(self.sagas.c.id == saga.id).values(values))

    def purge(self, connection: Connection, before: datetime, limit: int) -> int:
        """Delete up to *limit* sagas that ended *before*, with all that belongs to them.

        A sub-saga goes with the saga that it is a part of: as long as that one is not over it may
        have to be undone.

        Returns:
            How many were deleted, sub-sagas not counted.
        """
        columns, ends = self.sagas.c, [each.value for each in State if each.is_end]
        old = (columns.root.is_(None), columns.state.in_(ends), columns.changed_at < before)
        query = select(columns.id).where(*old).order_by(columns.changed_at).limit(limit)
        roots = connection.scalars(query.with_for_update(skip_locked=True)).all()
        if not roots:
            return 0
        parts = connection.scalars(select(columns.id).where(columns.root.in_(roots))).all()
        gone = [*roots, *parts]
        connection.execute(delete(self.steps).where(self.steps.c.saga.in_(gone)))
        connection.execute(delete(self.sagas).where(columns.id.in_(gone)))
        return len(roots)

    def _of(self, id: str) -> Select[Any]:
        return select(self.sagas).where(self.sagas.c.id == id)

    def _found(self, connection: Connection, id: str, query: Select[Any]) -> Saga:
        if (row := connection.execute(query).one_or_none()) is None:
            raise SagaError(
                f"There is no saga {id!r} here. `eda sagas list` shows those there are."
            )
        return _saga(row)

    # ── records ─────────────────────────────────────────────────────────────────────────────

    def records(self, connection: Connection, saga: str) -> list[Record]:
        """All records of a saga, in the order in which they were begun."""
        return [self._record(row) for row in self._rows(connection, saga)]

    def history(self, connection: Connection, saga: str) -> list[Entry]:
        """The same, with their times."""
        return [
            Entry(self._record(row), row.begun_at, row.ended_at, row.due, row.who, row.request)
            for row in self._rows(connection, saga)
        ]

    def asked(self, connection: Connection, request: UUID) -> tuple[str, int] | None:
        """The saga, and the id of the record, that a request belongs to."""
        columns = self.steps.c
        query = select(columns.saga, columns.id).where(columns.request == request)
        row = connection.execute(query).one_or_none()
        return None if row is None else (row.saga, row.id)

    def saga_of(self, connection: Connection, record: int) -> str:
        """The saga that a record belongs to."""
        columns = self.steps.c
        query = select(columns.saga).where(columns.id == record)
        return str(connection.execute(query).scalar_one())

    def begin(
        self,
        connection: Connection,
        saga: str,
        record: Record,
        *,
        request: UUID | None = None,
        seconds: float | None = None,
        who: str | None = None,
    ) -> Record:
        """Write down a new record, which is over in *seconds* if that is not None.

        Returns:
            The record as it will be read.
        """
        values = {
            "saga": saga,
            "kind": record.kind.value,
            "place": record.path,
            "attempt": record.attempt,
            "status": record.status.value,
            "timed_out": False,
            "ended": record.ended,
            "request": request,
            "value": json.dumps(record.value),
            "who": who,
            "begun_at": self.dialect.now(),
            "ended_at": None if record.ended is None else self.dialect.now(),
            "due": None if seconds is None else self.dialect.later(seconds),
        }
        key = connection.execute(insert(self.steps).values(values)).inserted_primary_key
        assert key is not None, "one row was inserted"
        return replace(record, id=int(key[0]), value=json.loads(values["value"]))

    def end(
        self,
        connection: Connection,
        record: Record,
        *,
        error: Mapping[str, Any] | None = None,
        who: str | None = None,
    ) -> Record:
        """Write down how a record has ended; an *error* as it travels.

        Returns:
            The record as it will be read.
        """
        value = json.dumps(record.value if error is None else {"error": error})
        values = {
            "status": record.status.value,
            "timed_out": record.timed_out,
            "ended": record.ended,
            "ended_at": self.dialect.now(),
            "value": value,
            "who": who,
        }
        connection.execute(update(self.steps).where(self.steps.c.id == record.id).values(values))
        return replace(record, value=self._value(record.status, value))

    def _rows(self, connection: Connection, saga: str) -> list[Row[Any]]:
        columns = self.steps.c
        query = select(self.steps).where(columns.saga == saga).order_by(columns.id)
        return list(connection.execute(query).all())

    def _record(self, row: Row[Any]) -> Record:
        status = Status(row.status)
        return Record(
            *(Kind(row.kind), row.place, row.attempt, status, row.ended),
            *(self._value(status, row.value), bool(row.timed_out), row.id),
        )

    def _value(self, status: Status, stored: str) -> Any:
        value = json.loads(stored)
        is_error = status is Status.failed and value is not None
        return self.read_error(value["error"]) if is_error else value


def _mutable(saga: Saga) -> dict[str, Any]:
    return {
        "state": saga.state.value,
        "data": json.dumps(saga.data),
        "back": saga.back,
        "cancelled": saga.cancelled,
        "error": saga.error,
        "record": saga.record,
    }


def _saga(row: Row[Any]) -> Saga:
    return Saga(
        *(row.id, row.name, row.version, State(row.state), json.loads(row.data)),
        *(bool(row.back), bool(row.cancelled), row.error, row.root, row.record),
        *(row.begun_at, row.changed_at),
    )
