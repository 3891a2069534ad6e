"""The coordinator of sagas: replies, wake-ups and decisions of people advance a saga.

Each transition is one transaction, with the commands that it sends. A command is an ordinary
request, its outcome an ordinary reply, and a time-out a message that waits in the outbox until it
is due. Any worker can handle any of them: it locks the saga, records the outcome, plans the next
commands and sends them. So the death of a worker loses nothing.

The pattern: the saga execution coordinator of Garcia-Molina and Salem, *Sagas* (1987).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from celery_eda.core import redaction
from celery_eda.core.limits import KEY_BYTES
from celery_eda.errors import SagaError, SagaTimeout
from celery_eda.requests import RemoteErrors
from celery_eda.sagas.definition import MISSING, Definition, Wait
from celery_eda.sagas.engine import SagaEngine
from celery_eda.sagas.messages import Wakeup
from celery_eda.sagas.record import Kind, Record, Status
from celery_eda.sagas.store import SagaInstance, SagaStore, State
from celery_eda.sagas.transition import Transition

log = redaction.logger(__name__)

#: Seconds until a timer asks again whether the definition of its saga fits.
ASK_AGAIN = 60.0
#: Seconds by which a timer's message may come early: it is sent by more than one clock.
GRACE = 1.0


@dataclass(frozen=True)
class Coordinator:
    """Coordinates the sagas of one service, in the transaction of the caller's connection."""

    engine: SagaEngine
    errors: RemoteErrors

    @property
    def store(self) -> SagaStore:
        return self.engine.store

    def begin(self, connection: Connection, definition: Definition, id: str, data: Any) -> bool:
        """Start a saga; return False, without any effect, if its id is in use.

        Raises:
            SagaError: the id is too long.
        """
        if len(id.encode()) > KEY_BYTES:
            raise SagaError(f"The id {id[:40]!r}… is longer than {KEY_BYTES} bytes. Shorten it.")
        saga = SagaInstance(
            id=id,
            name=definition.name,
            version=definition.version,
            state=State.running,
            data=dict(data),
        )
        return self.engine.begin(connection, saga)

    # ── replies and wake-ups ────────────────────────────────────────────────────────────────

    def receive_reply(self, connection: Connection, request: UUID, outcome: Any) -> bool:
        """Record the outcome of a command, and advance the saga that sent it.

        A reply that comes after the time-out, or after a redrive of a dead letter, counts too: a
        success is compensated if the saga has been.

        Args:
            connection: of the transaction that handles the reply.
            request: the id of the command.
            outcome: ``{"result": …}`` or ``{"error": …}``.

        Returns:
            False if no saga sent the request.
        """
        if (awaiting := self.store.awaiting(connection, request)) is None:
            return False
        id, record = awaiting
        self._record_outcome(self.engine.lock(connection, id), record, outcome)
        return True

    def wake(self, connection: Connection, wakeup: str, id: str, record: int) -> None:
        """Advance a saga after a time-out, a granted lock, or the end of a sub-saga.

        A wake-up is a question, which the database answers: anybody may have sent the message. For
        a record that has its outcome already, or a lock that is not held, it has no effect. One
        that comes before its time is sent again for that time, since clocks may be set back.

        Args:
            connection: of the transaction that handles the wake-up.
            wakeup: a value of :class:`celery_eda.sagas.messages.Wakeup`.
            id: of the saga.
            record: the id of the record that waited.
        """
        transition = self.engine.lock(connection, id)
        if Wakeup(wakeup) is Wakeup.sub_saga_ended:
            self._sub_saga_ended(transition, record)
            return
        found = transition.find(record)
        if found is None or found.status is not Status.open:
            return
        if not self._is_confirmed(transition, found, Wakeup(wakeup)):
            return
        if transition.misfit and Wakeup(wakeup) is Wakeup.timer:
            # The end of a wait may depend on its part: the timer asks again.
            self.engine.messages.send_wakeup(Wakeup.timer, id, record, countdown=ASK_AGAIN)
        elif Wakeup(wakeup) is Wakeup.lock_granted:
            transition.end(found, Status.done, value=found.value)
        else:
            self._timed_out(transition, found)
        self.engine.advance(transition)

    def _is_confirmed(self, transition: Transition, record: Record, wakeup: Wakeup) -> bool:
        """True if the database confirms a wake-up; one that is early is sent again for its time."""
        id = transition.saga.id
        if wakeup is Wakeup.lock_granted:
            if self.engine.holds_lock(transition, record):
                return True
            log.warning("a wake-up of the saga %s is ignored: it does not hold the lock", id)
            return False
        early = self.store.seconds_until_due(transition.connection, record.id)
        if early is None:
            log.warning("a wake-up of the saga %s is ignored: it has set no such timer", id)
        elif early > GRACE:
            self.engine.messages.send_wakeup(Wakeup.timer, id, record.id, countdown=early)
        return early is not None and early <= GRACE

    def _record_outcome(self, transition: Transition, id: int, outcome: Any) -> None:
        """Record the outcome of a command, or of a sub-saga, and advance the saga."""
        record = transition.find(id)
        if record is None or record.status not in (Status.open, Status.failed):
            return
        if "error" in outcome:
            if record.status is Status.open or record.timed_out:
                transition.end(record, Status.failed, error=outcome["error"])
        else:
            self._record_success(transition, record, outcome.get("result"))
        is_compensated = transition.saga.state in (State.compensated, State.cancelled)
        if is_compensated and record.kind is Kind.step:  # a late success is to be compensated too
            transition.change(state=State.compensating)
        self.engine.advance(transition)

    def _record_success(self, transition: Transition, record: Record, result: Any) -> None:
        if transition.latest(record) is record:
            transition.add_result(record, result)
        else:
            log.warning(
                "a redriven dead letter of the saga %s succeeded, after another attempt at %s had "
                "begun: the step may have taken effect twice. Check both, and correct by hand",
                transition.saga.id,
                record.path,
            )
        transition.end(record, Status.done, value=result)

    def _sub_saga_ended(self, transition: Transition, record: int) -> None:
        """Record the end of a sub-saga as the outcome of the record that waits for it."""
        sub_saga = self.store.sub_saga(transition.connection, record)
        if sub_saga is None or not sub_saga.state.is_end:
            return
        found = transition.find(record)
        to_compensate = found is not None and found.kind is Kind.undo
        completed = sub_saga.state is State.completed
        if completed and not to_compensate:
            outcome: dict[str, Any] = {"result": dict(sub_saga.data)}
        elif not completed and to_compensate:
            outcome = {"result": None}
        else:
            error = SagaError(f"{sub_saga.id} is {sub_saga.state.value}: {sub_saga.error}")
            outcome = {"error": self.errors.to_wire(error)}
        self._record_outcome(transition, record, outcome)

    def _timed_out(self, transition: Transition, record: Record) -> None:
        part = transition.part(record)
        if record.kind is Kind.sleep:
            transition.end(record, Status.done)
        elif isinstance(part, Wait) and part.default is not MISSING:
            transition.end(record, Status.done, value=part.default)
            transition.add_result(record, part.default)
        else:
            error = self.errors.to_wire(SagaTimeout(f"no outcome of {record.path} in time"))
            transition.end(record, Status.failed, error=error, timed_out=record.kind is Kind.step)

    # ── decisions of people ─────────────────────────────────────────────────────────────────

    def signal(self, connection: Connection, id: str, name: str, value: Any, who: str) -> None:
        """Send a signal to a saga. A signal that comes before its wait is stored for it.

        Raises:
            SagaError: the saga has no such wait, has received the signal, or has ended.
        """
        transition = self.engine.lock(connection, id)
        state = transition.saga.state
        if not isinstance(transition.definition.parts.get(name), Wait) or state.is_end:
            why = f"is {state.value}" if state.is_end else "waits for no such signal"
            raise SagaError(f"The saga {id} cannot be given {name!r}: it {why}.")
        waits = [e for e in transition.records if e.kind is Kind.wait and e.part == name]
        if waits and waits[-1].status is Status.open:
            transition.end(waits[-1], Status.done, value=value, who=who)
            transition.add_result(waits[-1], value)
            self.engine.advance(transition)
            return
        if waits and waits[-1].path == name:  # a wait inside a loop may come again
            raise SagaError(f"The saga {id} does not wait for {name!r} any more.")
        if any(each.kind is Kind.signal and each.path == name for each in transition.records):
            raise SagaError(f"The saga {id} has been given {name!r} already.")
        transition.begin(Record(Kind.signal, name, value=value), who=who)

    def cancel(self, connection: Connection, id: str, who: str) -> None:
        """Compensate a saga on behalf of *who*.

        Raises:
            SagaError: the saga has ended, or has passed its pivot.
        """
        self.engine.cancel(self.engine.lock(connection, id), who)

    def resume(self, connection: Connection, id: str, who: str, path: str | None = None) -> None:
        """Retry the failed parts of a parked saga, all or that at *path*, and advance the saga.

        Raises:
            SagaError: the saga is not parked, or nothing failed there.
        """
        self._unpark(connection, id, path, Status.again, who)

    def skip(self, connection: Connection, id: str, who: str, path: str) -> None:
        """Count the failed part at *path* of a parked saga as done, and advance the saga.

        Raises:
            SagaError: the saga is not parked, or nothing failed there.
        """
        self._unpark(connection, id, path, Status.skipped, who)

    def _unpark(
        self, connection: Connection, id: str, path: str | None, status: Status, who: str
    ) -> None:
        transition = self.engine.lock(connection, id)
        saga = transition.saga
        if saga.state is not State.parked:
            raise SagaError(f"The saga {id} is {saga.state.value}, not parked.")
        failed = [each for each in _failures(transition) if path in (None, each.path)]
        if path is not None and not failed:
            raise SagaError(f"Nothing has failed at {path!r} of the saga {id}.")
        for record in failed:
            transition.end(record, status, who=who)
        transition.add_missing_results()
        transition.change(state=State.compensating if saga.back else State.running, error=None)
        self.engine.advance(transition)


def _failures(transition: Transition) -> list[Record]:
    """The latest records that failed and block the saga in its direction."""
    forward = (Kind.step, Kind.lock, Kind.wait, Kind.undo)
    kinds = (Kind.undo,) if transition.saga.back else forward
    latest = {(each.kind, each.path): each for each in transition.records}
    return [each for each in latest.values() if each.kind in kinds and each.status is Status.failed]
