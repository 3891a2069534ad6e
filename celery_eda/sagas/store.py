"""The store of sagas: the state of each saga, and its history.

The state, the records that led to it and the commands that follow are written in one transaction.
A record changes once, when its outcome is known; so the records are the history of the saga.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from typing import Any
from uuid import UUID

from kombu.utils import json
from sqlalchemy import Connection, Row, Select, Table, delete, insert, select, update

from celery_eda.core.clock import utc
from celery_eda.databases import Dialect, ago
from celery_eda.errors import SagaError
from celery_eda.requests import RemoteErrors
from celery_eda.sagas.record import Kind, Record, Status


class State(str, Enum):
    """The state of a saga, which ends ``completed``, ``compensated`` or ``cancelled``.

    A ``parked`` saga waits for a person: see ``celery eda sagas resume`` and ``skip-step``.
    """

    running = "running"
    compensating = "compensating"
    parked = "parked"
    completed = "completed"
    compensated = "compensated"
    cancelled = "cancelled"

    @property
    def is_end(self) -> bool:
        """True if the saga has ended."""
        return self in (State.completed, State.compensated, State.cancelled)


@dataclass(frozen=True)
class SagaInstance:
    """One saga that was started.

    Attributes:
        name, version: those of the definition.
        back: True if the saga is being compensated, or was when it was parked.
        cancelled: True if a person ordered the compensation.
        error: the reason why the saga is parked, or was compensated.
        root: the id of the outermost saga, of which this one is a part; None if it is no part.
        record: the id of the record that waits for the end of this sub-saga.
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
class HistoryEntry:
    """One line of a saga's history.

    Attributes:
        due: when the time-out of the record passes, or passed.
        who: the person, or code, that ended the record; None for the outcome itself.
        request: the id of the command.
    """

    record: Record
    begun_at: datetime
    ended_at: datetime | None
    due: datetime | None
    who: str | None
    request: UUID | None


@dataclass(frozen=True)
class SagaStore:
    """The sagas of one database.

    Attributes:
        errors: rebuilds the errors in records.
    """

    sagas: Table
    steps: Table
    dialect: Dialect
    errors: RemoteErrors

    # ── sagas ───────────────────────────────────────────────────────────────────────────────

    def add(self, connection: Connection, saga: SagaInstance) -> bool:
        """Insert a new saga; return False if its id is in use."""
        values = {
            "id": saga.id,
            "name": saga.name,
            "version": saga.version,
            "root": saga.root,
            **_mutable(saga),
        }
        return self.dialect.insert_once(connection, self.sagas, values, now="begun_at")

    def lock(self, connection: Connection, id: str) -> SagaInstance:
        """Return one saga, locked until the transaction ends.

        Raises:
            SagaError: no saga has this id.
        """
        self.dialect.stop_writers(connection)
        return self._found(connection, id, self._of(id).with_for_update())

    def find(self, connection: Connection, id: str) -> SagaInstance:
        """Return one saga.

        Raises:
            SagaError: no saga has this id.
        """
        return self._found(connection, id, self._of(id))

    def sub_saga(self, connection: Connection, record: int) -> SagaInstance | None:
        """Return the sub-saga whose end a *record* waits for."""
        query = select(self.sagas).where(self.sagas.c.record == record)
        row = connection.execute(query).one_or_none()
        return None if row is None else _saga(row)

    def sub_sagas(self, connection: Connection, root: str) -> list[SagaInstance]:
        """Return the sub-sagas of all depths, oldest first."""
        query = select(self.sagas).where(self.sagas.c.root == root)
        return [_saga(row) for row in connection.execute(query.order_by(self.sagas.c.begun_at))]

    def select(
        self, connection: Connection, state: State | None, name: str | None, limit: int
    ) -> list[SagaInstance]:
        """Return up to *limit* sagas, the latest change first."""
        columns = self.sagas.c
        query = select(self.sagas).order_by(columns.changed_at.desc()).limit(limit)
        if state is not None:
            query = query.where(columns.state == state.value)
        if name is not None:
            query = query.where(columns.name == name)
        return [_saga(row) for row in connection.execute(query)]

    def save(self, connection: Connection, saga: SagaInstance) -> None:
        """Update the state of *saga*."""
        values = {**_mutable(saga), "changed_at": self.dialect.now()}
        connection.execute(update(self.sagas).where(self.sagas.c.id == saga.id).values(values))

    def purge(self, connection: Connection, before: datetime, limit: int) -> int:
        """Delete up to *limit* sagas that ended *before*, with their sub-sagas and records.

        A sub-saga is deleted together with its outermost saga, which may have to compensate it
        until then.

        Returns:
            The number of sagas deleted, without sub-sagas.
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

    def retention(self, seconds: float | None) -> SagaRetention:
        """Sagas may be deleted *seconds* after their end."""
        return SagaRetention(self, seconds)

    def _of(self, id: str) -> Select[Any]:
        return select(self.sagas).where(self.sagas.c.id == id)

    def _found(self, connection: Connection, id: str, query: Select[Any]) -> SagaInstance:
        if (row := connection.execute(query).one_or_none()) is None:
            raise SagaError(
                f"There is no saga {id!r} here. `eda sagas list` lists the sagas of this service."
            )
        return _saga(row)

    # ── records ─────────────────────────────────────────────────────────────────────────────

    def records(self, connection: Connection, saga: str) -> list[Record]:
        """Return all records of a saga, in the order in which they began."""
        return [self._record(row) for row in self._rows(connection, saga)]

    def history(self, connection: Connection, saga: str) -> list[HistoryEntry]:
        """Return all records of a saga with their times, in the order in which they began."""
        return [
            HistoryEntry(
                record=self._record(row),
                begun_at=row.begun_at,
                ended_at=row.ended_at,
                due=row.due,
                who=row.who,
                request=row.request,
            )
            for row in self._rows(connection, saga)
        ]

    def awaiting(self, connection: Connection, request: UUID) -> tuple[str, int] | None:
        """Return the ids of the saga and the record that await the reply to *request*."""
        columns = self.steps.c
        query = select(columns.saga, columns.id).where(columns.request == request)
        row = connection.execute(query).one_or_none()
        return None if row is None else (row.saga, row.id)

    def saga_of(self, connection: Connection, record: int) -> str:
        """Return the id of the saga to which a *record* belongs."""
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
        """Insert a new record.

        Args:
            connection: of the caller's transaction.
            saga: the id of the saga.
            record: to be inserted.
            request: the id of the command.
            seconds: until the time-out; None for no time-out.
            who: the person, or code, behind the record.

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
        """Update a record with its outcome; *error* has the shape of an error in a reply.

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

    def seconds_until_due(self, connection: Connection, record: int) -> float | None:
        """Seconds until the time-out of a record, by the database's clock; None if it has none."""
        query = select(self.steps.c.due, self.dialect.now()).where(self.steps.c.id == record)
        due, now = connection.execute(query).one()
        return None if due is None else (utc(due) - utc(now)).total_seconds()

    def _rows(self, connection: Connection, saga: str) -> list[Row[Any]]:
        columns = self.steps.c
        query = select(self.steps).where(columns.saga == saga).order_by(columns.id)
        return list(connection.execute(query).all())

    def _record(self, row: Row[Any]) -> Record:
        status = Status(row.status)
        return Record(
            kind=Kind(row.kind),
            path=row.place,
            attempt=row.attempt,
            status=status,
            ended=row.ended,
            value=self._value(status, row.value),
            timed_out=bool(row.timed_out),
            id=row.id,
        )

    def _value(self, status: Status, stored: str) -> Any:
        value = json.loads(stored)
        is_error = status is Status.failed and value is not None
        return self.errors.from_wire(value["error"]) if is_error else value


def _mutable(saga: SagaInstance) -> dict[str, Any]:
    return {
        "state": saga.state.value,
        "data": json.dumps(saga.data),
        "back": saga.back,
        "cancelled": saga.cancelled,
        "error": saga.error,
        "record": saga.record,
    }


def _saga(row: Row[Any]) -> SagaInstance:
    return SagaInstance(
        id=row.id,
        name=row.name,
        version=row.version,
        state=State(row.state),
        data=json.loads(row.data),
        back=bool(row.back),
        cancelled=bool(row.cancelled),
        error=row.error,
        root=row.root,
        record=row.record,
        begun_at=row.begun_at,
        changed_at=row.changed_at,
    )


@dataclass(frozen=True)
class SagaRetention:
    """The rule of retention for sagas, which span two tables; see ``retention.Chore``."""

    store: SagaStore
    seconds: float | None
    what: str = "sagas"

    @property
    def is_due(self) -> bool:
        return self.seconds is not None

    def step(self, connection: Connection, limit: int) -> int:
        if self.seconds is None:
            return 0
        return self.store.purge(
            connection, ago(connection, self.store.dialect, self.seconds), limit
        )
