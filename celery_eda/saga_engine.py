"""Has a saga go on: looks what follows, writes that down, and sends it, in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from celery import Celery
from sqlalchemy import Connection

from celery_eda import context, redaction
from celery_eda.addresses import SAGA_HEADER
from celery_eda.errors import SagaError
from celery_eda.limits import KEY_BYTES
from celery_eda.reply import Reply
from celery_eda.saga_definition import Data, Definitions, Lock, SubSaga, Wait
from celery_eda.saga_locks import SagaLocks
from celery_eda.saga_log import Saga, SagaLog, State
from celery_eda.saga_plan import (
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
from celery_eda.saga_record import Kind, Record, Status
from celery_eda.saga_transition import Transition

log = redaction.logger(__name__)

#: The task that tells a saga what no reply tells: what it is, the saga's id, that of a record.
NEWS_TASK = "celery_eda.saga_news"


class News(str, Enum):
    """What a saga is told: its time is over, it has a lock, its sub-saga is at its end."""

    time = "time"
    lock = "lock"
    end = "end"


@dataclass(frozen=True)
class SagaEngine:
    """Moves the sagas of one service on.

    What they send is published right here: a scope of that transaction has to be open. Whoever has
    a saga locked may lock its sub-sagas, never the other way round.

    Attributes:
        request: asks a task for a reply into this service's database.
        address: asks for the queue of this service that such replies, and news, come to.
    """

    app: Celery
    definitions: Definitions
    log: SagaLog
    locks: SagaLocks
    request: Callable[..., Reply[Any]]
    address: Callable[[], str]

    def begin(self, connection: Connection, saga: Saga) -> bool:
        """Begin *saga*; returns False, and does nothing, if there is one of that id."""
        if not self.log.add(connection, saga):
            return False
        definition = self.definitions.of(saga.name, saga.version)
        self.go_on(Transition(connection, self.log, definition, saga, []))
        return True

    def lock(self, connection: Connection, id: str) -> Transition:
        """The saga *id*, to be changed.

        Raises:
            SagaError: there is none, or its definition is not in the code any more.
        """
        return Transition.of(connection, self.log, self.definitions, id)

    def go_on(self, transition: Transition) -> None:
        """Carry out what follows now, and save the saga's new state."""
        while transition.saga.state in (State.running, State.compensating):
            was_undoing = transition.saga.back
            plan = self._planned(transition)
            if plan is None:
                break
            if transition.saga.back and not was_undoing:
                continue  # the decisions of this plan belong to the way forward
            if not self._apply(transition, plan.decisions):
                break
        transition.save()
        if transition.saga.state.is_end:
            self._leave(transition)

    def cancel(self, transition: Transition, who: str) -> None:
        """Have a saga undone.

        Raises:
            SagaError: it is over, or there is no way back any more.
        """
        saga = transition.saga
        if saga.state.is_end or transition.pivoted:
            why = f"is {saga.state.value}" if saga.state.is_end else "has passed its pivot"
            raise SagaError(f"The saga {saga.id} {why}, and cannot be cancelled.")
        error = f"cancelled by {who}"
        transition.change(state=State.compensating, back=True, cancelled=True, error=error)
        self.go_on(transition)

    def release(self, connection: Connection, owner: str) -> None:
        """Let go of the locks of a saga, and tell those that have them then."""
        for heir, record in self.locks.release(connection, owner):
            self._send(News.lock, heir, record)

    def _leave(self, transition: Transition) -> None:
        """Tell those who wait for the end of a saga."""
        saga = transition.saga
        if saga.record is not None:
            self._send(News.end, self.log.saga_of(transition.connection, saga.record), saga.record)
        parts = transition.definition.parts.values()
        if saga.root is None and any(isinstance(each, Lock | SubSaga) for each in parts):
            self.release(transition.connection, saga.id)

    def _planned(self, transition: Transition) -> Plan | None:
        """Plan what follows, and change the saga's state accordingly; None if it is parked then."""
        saga, interpreter = transition.saga, transition.interpreter()
        try:
            with context.silenced(f"A condition of the saga {saga.name}"):
                plan = interpreter.backward() if saga.back else interpreter.forward()
        except Exception as error:
            log.exception("the saga %s is parked: its definition fails", saga.id)
            _park(transition, f"its definition fails: {type(error).__name__}: {error}")
            return None
        if plan.stuck is not None:
            why, record = plan.stuck
            _park(transition, f"{why}: {_text(record)}")
        elif saga.back:
            _follow_backward(transition, plan)
        else:
            _follow_forward(transition, plan)
        return None if transition.saga.state is State.parked else plan

    # ── what was decided ────────────────────────────────────────────────────────────────────

    def _apply(self, transition: Transition, decisions: Sequence[Decision]) -> bool:
        """Do what was decided; returns whether it is worth another look at once."""
        again = False
        for decision in decisions:
            match decision:
                case SendCommand():
                    self._ask(transition, decision)
                case RecordChoice(kind, path, value):
                    transition.begin(Record(kind, path, status=Status.done, value=value))
                case CancelSubSaga(record):
                    self._stop(transition, record)
                case TakeLock(part, path, key):
                    again = self._hold(transition, part, path, key) or again
                case AwaitSignal(part, path):
                    again = self._await(transition, part, path) or again
                case StartTimer(part, path):
                    self._wait(transition, Record(Kind.sleep, path), part.seconds)
                case StopWaiting(record):
                    transition.end(record, Status.dropped)
        return again

    def _ask(self, transition: Transition, ask: SendCommand) -> None:
        step = ask.step
        record = Record(Kind.undo if ask.undo else Kind.step, ask.path, ask.attempt)
        timeout = None if ask.undo else step.timeout
        if isinstance(step, SubSaga):
            record = self._wait(transition, record, timeout)
            if ask.undo:
                self._undo_part(transition, ask.undo, record)
            else:
                self._begin_part(transition, step, record, ask.kwargs if step.give else ask.args[0])
            return
        task = step.undo if ask.undo else step.task
        headers = {**step.options.get("headers", {}), SAGA_HEADER: transition.saga.id}
        options = {**step.options, "headers": headers}
        if ask.delay:
            options["countdown"] = ask.delay
        reply = self.request(task, ask.args, dict(ask.kwargs), address="durable", **options)
        self._wait(transition, record, timeout, UUID(reply.correlation_id))

    def _begin_part(
        self, transition: Transition, part: SubSaga, record: Record, data: Data
    ) -> None:
        definition, saga = part.definition, transition.saga
        begun = Saga(
            *(_part_id(saga, record), definition.name, definition.version, State.running),
            *(dict(data),),
            root=saga.root or saga.id,
            record=record.id,
        )
        self.begin(transition.connection, begun)

    def _undo_part(self, transition: Transition, done: Record, record: Record) -> None:
        """Have a sub-saga undone that is completed; one behind its pivot cannot be."""
        part = self.lock(transition.connection, _part_id(transition.saga, done))
        part.change(record=record.id)
        if part.saga.state is State.completed and not part.pivoted:
            error = f"undone with {transition.saga.id}"
            part.change(state=State.compensating, back=True, error=error)
        self.go_on(part)

    def _stop(self, transition: Transition, record: Record) -> None:
        """Have a sub-saga cancelled that is on its way; what cannot be comes to its end."""
        part = self.lock(transition.connection, _part_id(transition.saga, record))
        if not part.saga.back and not part.saga.state.is_end:
            with suppress(SagaError):
                self.cancel(part, f"saga {transition.saga.id}")

    def _hold(self, transition: Transition, part: Lock, path: str, key: str) -> bool:
        """Take a lock, or wait for it; True if it was free."""
        record = self._wait(transition, Record(Kind.lock, path, value=key), part.timeout)
        saga = transition.saga
        owner = saga.root or saga.id
        if not self.locks.take(transition.connection, key, owner, saga=saga.id, record=record.id):
            return False
        transition.end(record, Status.done, value=key)
        return True

    def _await(self, transition: Transition, part: Wait, path: str) -> bool:
        """Wait for a signal; True if it was given before."""
        for signal in transition.records:
            early = signal.kind is Kind.signal and signal.status is Status.open
            if early and signal.path == part.name:
                transition.end(signal, Status.done, value=signal.value)
                transition.keep(transition.begin(_answered(path, signal.value)), signal.value)
                return True
        self._wait(transition, Record(Kind.wait, path), part.timeout)
        return False

    def _wait(
        self,
        transition: Transition,
        record: Record,
        seconds: float | None,
        request: UUID | None = None,
    ) -> Record:
        """Write down something that is open, and have the saga told when its time is over."""
        begun = transition.begin(record, request=request, seconds=seconds)
        if seconds is not None:
            self._send(News.time, transition.saga.id, begun.id, countdown=seconds)
        return begun

    def _send(self, news: News, saga: str, record: int, **options: Any) -> None:
        self.app.send_task(
            *(NEWS_TASK, (news.value, saga, record)),
            queue=self.address(),
            ignore_result=True,
            **options,
        )


def _answered(path: str, value: Any) -> Record:
    return Record(Kind.wait, path, status=Status.done, value=value)


def _part_id(saga: Saga, record: Record) -> str:
    """What the sub-saga of *record* is called."""
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
