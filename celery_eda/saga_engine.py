"""Has a saga go on: looks what follows, writes that down, and sends it, in one transaction."""

from __future__ import annotations

from collections.abc import Callable
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
from celery_eda.reply import Reply
from celery_eda.saga_definition import Data, Definitions, Lock, SubSaga, Wait
from celery_eda.saga_locks import SagaLocks
from celery_eda.saga_log import Saga, SagaLog, State
from celery_eda.saga_run import (
    Ask,
    Await,
    Decision,
    Drop,
    Hold,
    Kind,
    Note,
    Progress,
    Record,
    Rest,
    Run,
    Status,
    Stop,
)
from celery_eda.saga_transition import Transition
from celery_eda.tables import KEY_BYTES

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

    def go_on(self, turn: Transition) -> None:
        """Do what follows, and write down where the saga is then."""
        while turn.saga.state in (State.running, State.compensating):
            before, run = turn.saga.state, turn.run()
            state = self._judge(turn, run)
            if state is State.parked:
                break
            if state is not before and state is State.compensating:
                continue  # nothing of what was to come is begun any more
            if not self._apply(turn, run.decisions):
                break
        turn.save()
        if turn.saga.state.is_end:
            self._leave(turn)

    def cancel(self, turn: Transition, who: str) -> None:
        """Have a saga undone.

        Raises:
            SagaError: it is over, or there is no way back any more.
        """
        saga = turn.saga
        if saga.state.is_end or turn.run().pivoted:
            why = f"is {saga.state.value}" if saga.state.is_end else "has passed its pivot"
            raise SagaError(f"The saga {saga.id} {why}, and cannot be cancelled.")
        error = f"cancelled by {who}"
        turn.change(state=State.compensating, back=True, cancelled=True, error=error)
        self.go_on(turn)

    def release(self, connection: Connection, owner: str) -> None:
        """Let go of the locks of a saga, and tell those that have them then."""
        for heir, record in self.locks.release(connection, owner):
            self._send(News.lock, heir, record)

    def _leave(self, turn: Transition) -> None:
        """Tell those who wait for the end of a saga."""
        saga = turn.saga
        if saga.record is not None:
            self._send(News.end, self.log.saga_of(turn.connection, saga.record), saga.record)
        parts = turn.definition.parts.values()
        if saga.root is None and any(isinstance(each, Lock | SubSaga) for each in parts):
            self.release(turn.connection, saga.id)

    def _judge(self, turn: Transition, run: Run) -> State:
        """See where the saga is by a look at it."""
        saga = turn.saga
        try:
            with context.silenced(f"A condition of the saga {saga.name}"):
                progress = run.backward() if saga.back else run.forward()
        except Exception as error:
            log.exception("the saga %s is parked: its definition fails", saga.id)
            _park(turn, f"its definition fails: {type(error).__name__}: {error}")
            return State.parked
        if run.stuck is not None:
            why, record = run.stuck
            _park(turn, f"{why}: {_text(record)}")
        elif saga.back:
            if progress is Progress.done:
                turn.change(state=State.cancelled if saga.cancelled else State.compensated)
        elif progress is Progress.failed:
            reason = run.failure or _text(_last_failure(run))
            if run.pivoted:
                _park(turn, f"it failed after the pivot: {reason}")
            else:
                turn.change(state=State.compensating, back=True, error=reason)
        elif progress is Progress.done and not run.unsettled:
            turn.change(state=State.completed)
        return turn.saga.state

    # ── what was decided ────────────────────────────────────────────────────────────────────

    def _apply(self, turn: Transition, decisions: list[Decision]) -> bool:
        """Do what was decided; returns whether it is worth another look at once."""
        again = False
        for decision in decisions:
            match decision:
                case Ask():
                    self._ask(turn, decision)
                case Note(kind, place, value):
                    turn.begin(Record(kind, place, status=Status.done, value=value))
                case Stop(record):
                    self._stop(turn, record)
                case Hold(part, place, key):
                    again = self._hold(turn, part, place, key) or again
                case Await(part, place):
                    again = self._await(turn, part, place) or again
                case Rest(part, place):
                    self._wait(turn, Record(Kind.sleep, place), part.seconds)
                case Drop(record):
                    turn.end(record, Status.dropped)
        return again

    def _ask(self, turn: Transition, ask: Ask) -> None:
        step = ask.step
        record = Record(Kind.undo if ask.undo else Kind.step, ask.place, ask.attempt)
        timeout = None if ask.undo else step.timeout
        if isinstance(step, SubSaga):
            record = self._wait(turn, record, timeout)
            if ask.undo:
                self._undo_part(turn, ask.undo, record)
            else:
                self._begin_part(turn, step, record, ask.kwargs if step.give else ask.args[0])
            return
        task = step.undo if ask.undo else step.task
        headers = {**step.options.get("headers", {}), SAGA_HEADER: turn.saga.id}
        options = {**step.options, "headers": headers}
        if ask.delay:
            options["countdown"] = ask.delay
        reply = self.request(task, ask.args, dict(ask.kwargs), address="durable", **options)
        self._wait(turn, record, timeout, UUID(reply.correlation_id))

    def _begin_part(self, turn: Transition, part: SubSaga, record: Record, data: Data) -> None:
        definition, saga = part.definition, turn.saga
        begun = Saga(
            *(_part_id(saga, record), definition.name, definition.version, State.running),
            *(dict(data),),
            root=saga.root or saga.id,
            record=record.id,
        )
        self.begin(turn.connection, begun)

    def _undo_part(self, turn: Transition, done: Record, record: Record) -> None:
        """Have a sub-saga undone that is completed; one behind its pivot cannot be."""
        part = self.lock(turn.connection, _part_id(turn.saga, done))
        part.change(record=record.id)
        if part.saga.state is State.completed and not part.run().pivoted:
            error = f"undone with {turn.saga.id}"
            part.change(state=State.compensating, back=True, error=error)
        self.go_on(part)

    def _stop(self, turn: Transition, record: Record) -> None:
        """Have a sub-saga cancelled that is on its way; what cannot be comes to its end."""
        part = self.lock(turn.connection, _part_id(turn.saga, record))
        if not part.saga.back and not part.saga.state.is_end:
            with suppress(SagaError):
                self.cancel(part, f"saga {turn.saga.id}")

    def _hold(self, turn: Transition, part: Lock, place: str, key: str) -> bool:
        """Take a lock, or wait for it; True if it was free."""
        record = self._wait(turn, Record(Kind.lock, place, value=key), part.timeout)
        saga = turn.saga
        owner = saga.root or saga.id
        if not self.locks.take(turn.connection, key, owner, saga=saga.id, record=record.id):
            return False
        turn.end(record, Status.done, value=key)
        return True

    def _await(self, turn: Transition, part: Wait, place: str) -> bool:
        """Wait for a signal; True if it was given before."""
        for signal in turn.records:
            early = signal.kind is Kind.signal and signal.status is Status.open
            if early and signal.place == part.name:
                turn.end(signal, Status.done, value=signal.value)
                turn.keep(turn.begin(_answered(place, signal.value)), signal.value)
                return True
        self._wait(turn, Record(Kind.wait, place), part.timeout)
        return False

    def _wait(
        self,
        turn: Transition,
        record: Record,
        seconds: float | None,
        request: UUID | None = None,
    ) -> Record:
        """Write down something that is open, and have the saga told when its time is over."""
        begun = turn.begin(record, request=request, seconds=seconds)
        if seconds is not None:
            self._send(News.time, turn.saga.id, begun.id, countdown=seconds)
        return begun

    def _send(self, news: News, saga: str, record: int, **options: Any) -> None:
        self.app.send_task(
            *(NEWS_TASK, (news.value, saga, record)),
            queue=self.address(),
            ignore_result=True,
            **options,
        )


def _answered(place: str, value: Any) -> Record:
    return Record(Kind.wait, place, status=Status.done, value=value)


def _part_id(saga: Saga, record: Record) -> str:
    """What the sub-saga of *record* is called."""
    id = f"{saga.id}/{record.place}" + (f"#{record.attempt}" if record.attempt > 1 else "")
    return id if len(id.encode()) <= KEY_BYTES else str(uuid5(NAMESPACE_URL, id))


def _park(turn: Transition, why: str) -> None:
    turn.change(state=State.parked, error=why)


def _last_failure(run: Run) -> Record:
    failed = [each for each in run.records if each.status is Status.failed]
    return max(failed, key=lambda each: each.ended or 0)


def _text(record: Record) -> str:
    error = record.value
    what = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else "no outcome"
    return redaction.redact(f"{record.place}: {what}")
