"""The engine of sagas: plans the next decisions, records and executes them in one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from uuid import NAMESPACE_URL, UUID, uuid5

from sqlalchemy import Connection

from celery_eda.core import redaction
from celery_eda.core.addresses import SAGA_HEADER
from celery_eda.core.error_text import text_of
from celery_eda.core.interruption import exceptions_only
from celery_eda.core.limits import KEY_BYTES
from celery_eda.core.silence import silenced
from celery_eda.errors import SagaError
from celery_eda.sagas.definition import Definitions, Lock, SubSaga
from celery_eda.sagas.locks import SagaLocks
from celery_eda.sagas.messages import Messages, Wakeup
from celery_eda.sagas.plan import (
    AwaitSignal,
    CancelSubSaga,
    Decision,
    Plan,
    Progress,
    RecordChoice,
    SendCommand,
    StartTimer,
    StopWaiting,
    TakeLock,
)
from celery_eda.sagas.record import Kind, Record, Status
from celery_eda.sagas.store import SagaInstance, SagaStore, State
from celery_eda.sagas.transition import Transition

log = redaction.logger(__name__)

#: States in which a saga goes on by itself.
ADVANCING = (State.running, State.compensating)


@dataclass(frozen=True)
class SagaEngine:
    """Advances the sagas of one service.

    All methods publish: a publishing scope of the caller's transaction has to be open. A
    transaction that has locked a saga may lock its sub-sagas, never the other way round.
    """

    definitions: Definitions
    store: SagaStore
    locks: SagaLocks
    messages: Messages

    def begin(self, connection: Connection, saga: SagaInstance) -> bool:
        """Start *saga*; return False, without any effect, if its id is in use."""
        if not self.store.add(connection, saga):
            return False
        definition = self.definitions.of(saga.name, saga.version)
        self.advance(Transition(connection, self.store, definition, saga, []))
        return True

    def lock(self, connection: Connection, id: str) -> Transition:
        """Lock the saga *id* until the transaction ends, and read it.

        Raises:
            SagaError: no saga has this id, or its definition is not in the code.
        """
        return Transition.of(connection, self.store, self.definitions, id)

    def advance(self, transition: Transition) -> None:
        """Carry out all decisions that are possible now, and save the saga's new state.

        A saga whose definition has changed, so that it does not fit the history, is parked.
        """
        if transition.saga.state in ADVANCING and (why := transition.misfit):
            log.error(
                "the saga %s is parked, because its definition has changed: %s. Restore it and "
                "describe the new one with the next version, then run `celery eda sagas resume`",
                transition.saga.id,
                why,
            )
            _park(transition, f"its definition has changed: {why}")
        while transition.saga.state in ADVANCING:
            was_compensating = transition.saga.back
            plan = self._plan(transition)
            if plan is None:
                break
            if transition.saga.back and not was_compensating:
                continue  # the decisions of this plan belong to the forward direction
            if not self._carry_out(transition, plan.decisions):
                break
        transition.save()
        if transition.saga.state.is_end:
            self._notify_of_end(transition)

    def cancel(self, transition: Transition, who: str) -> None:
        """Compensate a saga on behalf of *who*.

        Raises:
            SagaError: the saga has ended, or has passed its pivot.
        """
        saga = transition.saga
        if saga.state.is_end or transition.pivoted:
            why = f"is {saga.state.value}" if saga.state.is_end else "has passed its pivot"
            raise SagaError(f"The saga {saga.id} {why}, and cannot be cancelled.")
        error = f"cancelled by {who}"
        transition.change(state=State.compensating, back=True, cancelled=True, error=error)
        self.advance(transition)

    def release(self, connection: Connection, owner: str) -> None:
        """Release the locks of a saga, and wake the sagas that hold them next."""
        for granted, record in self.locks.release(connection, owner):
            self.messages.send_wakeup(Wakeup.lock_granted, granted, record)

    def _notify_of_end(self, transition: Transition) -> None:
        """Wake the parent of a saga that has ended, or the sagas that queue for its locks."""
        saga, connection = transition.saga, transition.connection
        if saga.record is not None:
            parent = self.store.saga_of(connection, saga.record)
            self.messages.send_wakeup(Wakeup.sub_saga_ended, parent, saga.record)
        parts = transition.definition.parts.values()
        if saga.root is None and any(isinstance(each, Lock | SubSaga) for each in parts):
            self.release(connection, saga.id)

    def _plan(self, transition: Transition) -> Plan | None:
        """Plan the next decisions, and change the saga's state accordingly; None if parked."""
        saga, interpreter = transition.saga, transition.interpreter()
        try:
            silence = silenced(f"A condition of the saga {saga.name}")
            with silence, exceptions_only():
                plan = interpreter.backward() if saga.back else interpreter.forward()
        except Exception as error:
            log.exception(
                "the saga %s is parked, because its definition fails. Correct the code, then run "
                "`celery eda sagas resume`",
                saga.id,
            )
            _park(transition, f"its definition fails: {type(error).__name__}: {text_of(error)}")
            return None
        if plan.stuck is not None:
            why, record = plan.stuck
            _park(transition, f"{why}: {_text(record)}")
        elif saga.back:
            _follow_backward(transition, plan)
        else:
            _follow_forward(transition, plan)
        return None if transition.saga.state is State.parked else plan

    # ── carrying out decisions ──────────────────────────────────────────────────────────────

    def _carry_out(self, transition: Transition, decisions: Sequence[Decision]) -> bool:
        """Carry out *decisions*; return True if the saga can advance further at once."""
        advances = False
        for decision in decisions:
            match decision:
                case SendCommand(step=SubSaga() as part):
                    self._send_to_sub_saga(transition, part, decision)
                case SendCommand():
                    self._send_command(transition, decision)
                case RecordChoice(kind, path, value):
                    transition.begin(Record(kind, path, status=Status.done, value=value))
                case CancelSubSaga(record):
                    self._cancel_sub_saga(transition, record)
                case TakeLock():
                    advances = self._take_lock(transition, decision) or advances
                case AwaitSignal():
                    advances = self._await_signal(transition, decision) or advances
                case StartTimer(part, path):
                    self._begin_waiting(transition, Record(Kind.sleep, path), part.seconds)
                case StopWaiting(record):
                    transition.end(record, Status.dropped)
        return advances

    def _send_command(self, transition: Transition, command: SendCommand) -> None:
        step = command.step
        assert not isinstance(step, SubSaga), "a sub-saga gets no message"
        task = step.undo if command.undo else step.task
        headers = {**step.options.get("headers", {}), SAGA_HEADER: transition.saga.id}
        options = {**step.options, "headers": headers}
        if command.delay:
            options["countdown"] = command.delay
        assert task is not None, "a step without a compensation gets no undo"
        request = self.messages.send_command(task, command.args, command.kwargs, **options)
        self._begin_waiting(transition, _record_of(command), _timeout_of(command), request)

    def _send_to_sub_saga(
        self, transition: Transition, part: SubSaga, command: SendCommand
    ) -> None:
        record = self._begin_waiting(transition, _record_of(command), _timeout_of(command))
        if command.undo:
            self._compensate_sub_saga(transition, command.undo, record)
            return
        saga = transition.saga
        sub_saga = SagaInstance(
            id=_sub_saga_id(saga, record),
            name=part.definition.name,
            version=part.definition.version,
            state=State.running,
            data=dict(command.kwargs if part.give else command.args[0]),
            root=saga.root or saga.id,
            record=record.id,
        )
        self.begin(transition.connection, sub_saga)

    def _compensate_sub_saga(self, transition: Transition, done: Record, record: Record) -> None:
        """Compensate a completed sub-saga; one that has passed its pivot only wakes its parent."""
        sub_saga = self.lock(transition.connection, _sub_saga_id(transition.saga, done))
        sub_saga.change(record=record.id)
        if sub_saga.saga.state is State.completed and not sub_saga.pivoted:
            error = f"compensated with {transition.saga.id}"
            sub_saga.change(state=State.compensating, back=True, error=error)
        self.advance(sub_saga)

    def _cancel_sub_saga(self, transition: Transition, record: Record) -> None:
        """Cancel a running sub-saga; one that has passed its pivot continues to its end."""
        sub_saga = self.lock(transition.connection, _sub_saga_id(transition.saga, record))
        if not sub_saga.saga.back and not sub_saga.saga.state.is_end:
            with suppress(SagaError):
                self.cancel(sub_saga, f"saga {transition.saga.id}")

    def holds_lock(self, transition: Transition, record: Record) -> bool:
        """True if *record* waits for a lock that its saga, or the outermost one, holds."""
        saga = transition.saga
        return record.kind is Kind.lock and self.locks.is_held(
            transition.connection, record.value, saga.root or saga.id
        )

    def _take_lock(self, transition: Transition, decision: TakeLock) -> bool:
        """Acquire a lock, or queue for it; return True if the lock was free."""
        record = self._begin_waiting(
            transition,
            Record(Kind.lock, decision.path, value=decision.key),
            decision.part.timeout,
        )
        saga = transition.saga
        acquired = self.locks.acquire(
            transition.connection,
            decision.key,
            saga.root or saga.id,
            saga=saga.id,
            record=record.id,
        )
        if acquired:
            transition.end(record, Status.done, value=decision.key)
        return acquired

    def _await_signal(self, transition: Transition, decision: AwaitSignal) -> bool:
        """Wait for a signal; return True if the signal came before the wait."""
        part, path = decision.part, decision.path
        for signal in transition.records:
            is_early = signal.kind is Kind.signal and signal.status is Status.open
            if is_early and signal.path == part.name:
                transition.end(signal, Status.done, value=signal.value)
                wait = Record(Kind.wait, path, status=Status.done, value=signal.value)
                transition.add_result(transition.begin(wait), signal.value)
                return True
        self._begin_waiting(transition, Record(Kind.wait, path), part.timeout)
        return False

    def _begin_waiting(
        self,
        transition: Transition,
        record: Record,
        seconds: float | None,
        request: UUID | None = None,
    ) -> Record:
        """Insert an open record, and have the saga woken after *seconds*, unless None."""
        begun = transition.begin(record, request=request, seconds=seconds)
        if seconds is not None:
            self.messages.send_wakeup(Wakeup.timer, transition.saga.id, begun.id, countdown=seconds)
        return begun


def _record_of(command: SendCommand) -> Record:
    kind = Kind.undo if command.undo else Kind.step
    return Record(kind, command.path, command.attempt)


def _timeout_of(command: SendCommand) -> float | None:
    """The time-out of a step. Its compensation has none: there is no alternative to it."""
    return None if command.undo else command.step.timeout


def _sub_saga_id(saga: SagaInstance, record: Record) -> str:
    """The id of the sub-saga of *record*: readable, or a UUID if that would be too long."""
    id = f"{saga.id}/{record.path}" + (f"#{record.attempt}" if record.attempt > 1 else "")
    return id if len(id.encode()) <= KEY_BYTES else str(uuid5(NAMESPACE_URL, id))


def _follow_backward(transition: Transition, plan: Plan) -> None:
    if plan.progress is Progress.done:
        state = State.cancelled if transition.saga.cancelled else State.compensated
        transition.change(state=state)


def _follow_forward(transition: Transition, plan: Plan) -> None:
    if plan.progress is Progress.failed:
        reason = plan.failure or _text(_last_failure(transition))
        if transition.pivoted or plan.passes_pivot:
            _park(transition, f"it failed after the pivot: {reason}")
        else:
            transition.change(state=State.compensating, back=True, error=reason)
    elif plan.progress is Progress.done and not plan.unsettled:
        transition.change(state=State.completed)


def _park(transition: Transition, why: str) -> None:
    transition.change(state=State.parked, error=why)


def _last_failure(transition: Transition) -> Record:
    failed = [each for each in transition.records if each.status is Status.failed]
    return max(failed, key=lambda each: each.ended or 0)


def _text(record: Record) -> str:
    error = record.value
    what = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else "no outcome"
    return redaction.redact(f"{record.path}: {what}")
