"""Sagas: each transition is one transaction, with the commands that it sends.

A command is an ordinary request, its outcome an ordinary reply, and a time-out a message that waits
in the outbox until it is due. Whichever worker gets one of them locks the saga, writes down what
has come, looks what follows, and sends that. There is nobody whose death would matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from celery_eda import redaction
from celery_eda.errors import SagaError, SagaTimeout
from celery_eda.limits import KEY_BYTES
from celery_eda.remote_errors import RemoteErrors
from celery_eda.saga_definition import MISSING, Definition, Wait
from celery_eda.saga_engine import News, SagaEngine
from celery_eda.saga_log import Saga, SagaLog, State
from celery_eda.saga_record import Kind, Record, Status
from celery_eda.saga_transition import Transition

log = redaction.logger(__name__)


@dataclass(frozen=True)
class Sagas:
    """What comes for the sagas of one service, in the transaction of the caller's connection."""

    engine: SagaEngine
    errors: RemoteErrors

    @property
    def log(self) -> SagaLog:
        return self.engine.log

    def begin(self, connection: Connection, definition: Definition, id: str, data: Any) -> bool:
        """Begin a saga; returns False, and does nothing, if there is one of that id.

        Raises:
            SagaError: the id is too long.
        """
        if len(id.encode()) > KEY_BYTES:
            raise SagaError(f"The id {id[:40]!r}… is longer than {KEY_BYTES} bytes.")
        saga = Saga(id, definition.name, definition.version, State.running, dict(data))
        return self.engine.begin(connection, saga)

    # ── outcomes and news ───────────────────────────────────────────────────────────────────

    def hear(self, connection: Connection, request: UUID, outcome: Any) -> bool:
        """Take the outcome of a command; returns False if no saga has asked.

        One that comes after its time, or from a dead letter that was sent again, counts too: what
        took effect after all is undone, if its saga has been.
        """
        if (asked := self.log.asked(connection, request)) is None:
            return False
        id, record = asked
        self._take(self.engine.lock(connection, id), record, outcome)
        return True

    def tell(self, connection: Connection, news: str, id: str, record: int) -> None:
        """Tell a saga what a record of it has waited for; it may be too late for that."""
        transition = self.engine.lock(connection, id)
        if News(news) is News.end:
            self._take_end(transition, record)
            return
        found = transition.find(record)
        if found is None or found.status is not Status.open:
            return
        if News(news) is News.lock:
            transition.end(found, Status.done, value=found.value)
        else:
            self._time_is_over(transition, found)
        self.engine.go_on(transition)

    def _take(self, transition: Transition, id: int, outcome: Any) -> None:
        """Write down the outcome of a command, or of a sub-saga, and go on."""
        record = transition.find(id)
        if record is None or record.status not in (Status.open, Status.failed):
            return
        if "error" in outcome:
            if record.status is Status.open or record.timed_out:
                transition.end(record, Status.failed, error=outcome["error"])
        else:
            if transition.latest(record) is record:
                transition.keep(record, outcome.get("result"))
            else:
                log.warning(
                    "a dead letter of the saga %s was sent again, and took effect beside the "
                    "attempt that followed it: %s",
                    *(transition.saga.id, record.path),
                )
            transition.end(record, Status.done, value=outcome.get("result"))
        is_undone = transition.saga.state in (State.compensated, State.cancelled)
        if is_undone and record.kind is Kind.step:  # and has something to undo after all
            transition.change(state=State.compensating)
        self.engine.go_on(transition)

    def _take_end(self, transition: Transition, record: int) -> None:
        """Take the end of a sub-saga for the outcome of what it was begun, or undone, by."""
        part = self.log.sub_saga(transition.connection, record)
        if part is None or not part.state.is_end:
            return
        found = transition.find(record)
        undone = found is not None and found.kind is Kind.undo
        if undone == (part.state is not State.completed):
            outcome: dict[str, Any] = {"result": None if undone else dict(part.data)}
        else:
            error = SagaError(f"{part.id} is {part.state.value}: {part.error}")
            outcome = {"error": self.errors.to_wire(error)}
        self._take(transition, record, outcome)

    def _time_is_over(self, transition: Transition, record: Record) -> None:
        part = transition.part(record)
        if record.kind is Kind.sleep:
            transition.end(record, Status.done)
        elif isinstance(part, Wait) and part.default is not MISSING:
            transition.end(record, Status.done, value=part.default)
            transition.keep(record, part.default)
        else:
            error = self.errors.to_wire(SagaTimeout(f"no outcome of {record.path} in time"))
            transition.end(record, Status.failed, error=error, timed_out=record.kind is Kind.step)

    # ── people ──────────────────────────────────────────────────────────────────────────────

    def signal(self, connection: Connection, id: str, name: str, value: Any, who: str) -> None:
        """Give a signal to a saga; one that does not wait for it yet finds it when it does.

        Raises:
            SagaError: it waits for no such signal, has had it, or is over.
        """
        transition = self.engine.lock(connection, id)
        state = transition.saga.state
        if not isinstance(transition.definition.parts.get(name), Wait) or state.is_end:
            why = f"is {state.value}" if state.is_end else "waits for no such signal"
            raise SagaError(f"The saga {id} cannot be given {name!r}: it {why}.")
        waits = [e for e in transition.records if e.kind is Kind.wait and e.part == name]
        if waits and waits[-1].status is Status.open:
            transition.end(waits[-1], Status.done, value=value, who=who)
            transition.keep(waits[-1], value)
            self.engine.go_on(transition)
            return
        if waits and waits[-1].path == name:  # in a loop it may be waited for once more
            raise SagaError(f"The saga {id} does not wait for {name!r} any more.")
        if any(each.kind is Kind.signal and each.path == name for each in transition.records):
            raise SagaError(f"The saga {id} has been given {name!r} already.")
        transition.begin(Record(Kind.signal, name, value=value), who=who)

    def cancel(self, connection: Connection, id: str, who: str) -> None:
        """Have a saga undone.

        Raises:
            SagaError: it is over, or there is no way back any more.
        """
        self.engine.cancel(self.engine.lock(connection, id), who)

    def resume(self, connection: Connection, id: str, who: str, path: str | None = None) -> None:
        """Have what failed tried again, and go on: all of it, or what failed at *path*.

        Raises:
            SagaError: it is not parked, or nothing failed there.
        """
        self._treat(connection, id, path, Status.again, who)

    def skip(self, connection: Connection, id: str, who: str, path: str) -> None:
        """Take what failed at *path* for done, and go on.

        Raises:
            SagaError: it is not parked, or nothing failed there.
        """
        self._treat(connection, id, path, Status.skipped, who)

    def _treat(
        self, connection: Connection, id: str, path: str | None, status: Status, who: str
    ) -> None:
        transition = self.engine.lock(connection, id)
        saga = transition.saga
        if saga.state is not State.parked:
            raise SagaError(f"The saga {id} is {saga.state.value}, not parked: it needs nobody.")
        kinds = (Kind.undo,) if saga.back else (Kind.step, Kind.lock, Kind.wait, Kind.undo)
        last = {(each.kind, each.path): each for each in transition.records}
        failed = [
            each
            for each in last.values()
            if each.kind in kinds and each.status is Status.failed and path in (None, each.path)
        ]
        if path is not None and not failed:
            raise SagaError(f"Nothing has failed at {path!r} of the saga {id}.")
        for record in failed:
            transition.end(record, status, who=who)
        transition.change(state=State.compensating if saga.back else State.running, error=None)
        self.engine.go_on(transition)
