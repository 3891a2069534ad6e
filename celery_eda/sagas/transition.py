"""One saga in one transaction: locked, and read once with its records.

Every change is made in the database and in memory, so that the interpreter sees it without another
read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from celery_eda.sagas.definition import Definition, Definitions, Part, Step, SubSaga, Wait
from celery_eda.sagas.fit import misfit
from celery_eda.sagas.interpreter import Interpreter
from celery_eda.sagas.record import Kind, Record, Status
from celery_eda.sagas.store import SagaInstance, SagaStore


@dataclass
class Transition:
    """A locked saga, its definition, and its records in the order in which they began."""

    connection: Connection
    store: SagaStore
    definition: Definition
    saga: SagaInstance
    records: list[Record]

    @classmethod
    def of(
        cls, connection: Connection, store: SagaStore, definitions: Definitions, id: str
    ) -> Transition:
        """Lock the saga *id* until the transaction ends, and read it.

        Raises:
            SagaError: no saga has this id, or its definition is not in the code.
        """
        saga = store.lock(connection, id)
        definition = definitions.of(saga.name, saga.version)
        return cls(connection, store, definition, saga, store.records(connection, id))

    def interpreter(self) -> Interpreter:
        """Return an interpreter of the saga as it is now."""
        return Interpreter(self.definition, self.saga.data, tuple(self.records))

    @property
    def pivoted(self) -> bool:
        """True if the saga has passed the point of no return."""
        return self.interpreter().pivoted

    @property
    def misfit(self) -> str | None:
        """The reason why the history does not fit the definition; None if it does."""
        return misfit(self.definition, self.records)

    def part(self, record: Record) -> Part | None:
        """Return the part to which a record belongs; None if the definition has lost it."""
        return self.definition.parts.get(record.part)

    def find(self, id: int) -> Record | None:
        """Return the record with this id; None if there is none."""
        return next((each for each in self.records if each.id == id), None)

    def latest(self, record: Record) -> Record:
        """Return the latest record of the same kind and path."""
        alike = [e for e in self.records if (e.kind, e.path) == (record.kind, record.path)]
        return alike[-1]

    def change(self, **what: Any) -> None:
        """Change attributes of the saga; :meth:`save` writes them to the database."""
        self.saga = replace(self.saga, **what)

    def save(self) -> None:
        """Write the saga's state to the database."""
        self.store.save(self.connection, self.saga)

    def begin(
        self,
        record: Record,
        *,
        request: UUID | None = None,
        seconds: float | None = None,
        who: str | None = None,
    ) -> Record:
        """Insert a new record; see :meth:`SagaStore.begin`."""
        if record.status is not Status.open:
            record = replace(record, ended=self._next_end())
        begun = self.store.begin(
            self.connection, self.saga.id, record, request=request, seconds=seconds, who=who
        )
        self.records.append(begun)
        return begun

    def end(
        self,
        record: Record,
        status: Status,
        *,
        value: Any = None,
        error: Mapping[str, Any] | None = None,
        timed_out: bool = False,
        who: str | None = None,
    ) -> None:
        """Update a record with its outcome; see :meth:`SagaStore.end`."""
        ended = replace(
            record, status=status, ended=self._next_end(), value=value, timed_out=timed_out
        )
        at = next(n for n, each in enumerate(self.records) if each.id == record.id)
        self.records[at] = self.store.end(self.connection, ended, error=error, who=who)

    def add_result(self, record: Record, value: Any) -> None:
        """Add a result or a signal to the saga's data, under the name that its part declares."""
        part = self.part(record)
        if record.kind is Kind.undo or not isinstance(part, Step | SubSaga | Wait):
            return
        if part.keep is not None:
            self.change(data={**self.saga.data, part.keep: value})

    def add_missing_results(self) -> None:
        """Add results that came while the definition had not the parts that keep them."""
        for record in self.records:
            part = self.part(record)
            keeps = isinstance(part, Step | SubSaga | Wait) and part.keep not in self.saga.data
            if keeps and record.status is Status.done and record.kind in (Kind.step, Kind.wait):
                self.add_result(record, record.value)

    def _next_end(self) -> int:
        return 1 + max((each.ended or 0 for each in self.records), default=0)
