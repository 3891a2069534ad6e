"""One saga in one transaction: locked, with all that is written down of it.

It is read once. What is changed here is changed in the database and in what is known of it, so that
the next look sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from celery_eda.saga_definition import Definition, Definitions, Part, Step, SubSaga, Wait
from celery_eda.saga_log import Saga, SagaLog
from celery_eda.saga_record import Kind, Record, Status
from celery_eda.saga_run import Interpreter


@dataclass
class Transition:
    """The saga, its definition, and the records of its parts in the order of their begin."""

    connection: Connection
    log: SagaLog
    definition: Definition
    saga: Saga
    records: list[Record]

    @classmethod
    def of(
        cls, connection: Connection, log: SagaLog, definitions: Definitions, id: str
    ) -> Transition:
        """That of the saga *id*, which nobody else changes before the transaction ends.

        Raises:
            SagaError: there is no such saga, or its definition is not in the code any more.
        """
        saga = log.lock(connection, id)
        definition = definitions.of(saga.name, saga.version)
        return cls(connection, log, definition, saga, log.records(connection, id))

    def interpreter(self) -> Interpreter:
        """An interpreter of the saga as it is now."""
        return Interpreter(self.definition, self.saga.data, tuple(self.records))

    @property
    def pivoted(self) -> bool:
        """True if the saga has passed the point of no return."""
        return self.interpreter().pivoted

    def part(self, record: Record) -> Part:
        """The part that a record is about."""
        return self.definition.parts[record.part]

    def find(self, id: int) -> Record | None:
        """The record of that id, if there is one."""
        return next((each for each in self.records if each.id == id), None)

    def latest(self, record: Record) -> Record:
        """The latest record of the same kind and path."""
        alike = [e for e in self.records if (e.kind, e.path) == (record.kind, record.path)]
        return alike[-1]

    def change(self, **what: Any) -> None:
        """Change attributes of the saga; :meth:`save` writes them down."""
        self.saga = replace(self.saga, **what)

    def save(self) -> None:
        """Write down where the saga is."""
        self.log.save(self.connection, self.saga)

    def begin(
        self,
        record: Record,
        *,
        request: UUID | None = None,
        seconds: float | None = None,
        who: str | None = None,
    ) -> Record:
        """Write down a new record, which is over in *seconds* if that is not None."""
        if record.status is not Status.open:
            record = replace(record, ended=self._next_end())
        begun = self.log.begin(
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
        """Write down how a record has ended; an *error* as it travels."""
        ended = replace(
            record, status=status, ended=self._next_end(), value=value, timed_out=timed_out
        )
        at = next(n for n, each in enumerate(self.records) if each.id == record.id)
        self.records[at] = self.log.end(self.connection, ended, error=error, who=who)

    def keep(self, record: Record, value: Any) -> None:
        """Let the saga know a result or a signal from now on, if its part says so."""
        part = self.part(record)
        if record.kind is Kind.undo or not isinstance(part, Step | SubSaga | Wait):
            return
        if part.keep is not None:
            self.change(data={**self.saga.data, part.keep: value})

    def _next_end(self) -> int:
        return 1 + max((each.ended or 0 for each in self.records), default=0)
