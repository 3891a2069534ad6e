"""Sagas: each transition is one transaction, with the commands that it sends.

A command is an ordinary request, its outcome an ordinary reply, and a time-out a message that waits
in the outbox until it is due. Whichever worker gets one of them locks the saga, writes down what
has come, looks what follows, and sends that. There is nobody whose death would matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from celery import Celery
from sqlalchemy import Connection

from celery_eda import context, redaction
from celery_eda.errors import SagaError, SagaTimeout
from celery_eda.remote_errors import RemoteErrors
from celery_eda.reply import Reply
from celery_eda.saga_definition import MISSING, Definition, Step, Wait
from celery_eda.saga_log import Saga, SagaLog, State
from celery_eda.saga_run import (
    Ask,
    Await,
    Decision,
    Drop,
    Kind,
    Note,
    Progress,
    Record,
    Rest,
    Run,
    Status,
    name_of,
)

log = redaction.logger(__name__)

#: The task that tells a saga that time is over: with the saga's id and that of a record.
TIME_TASK = "celery_eda.saga_time"


@dataclass(frozen=True)
class Definitions:
    """The sagas that an app knows, by name and version."""

    known: dict[str, dict[int, Definition]] = field(default_factory=dict)

    def add(self, definition: Definition) -> None:
        """Let there be *definition*.

        Raises:
            SagaError: there is another one of that name and version.
        """
        versions = self.known.setdefault(definition.name, {})
        if versions.get(definition.version, definition).origin != definition.origin:
            raise SagaError(
                f"The saga {definition.name} has version {definition.version} already. Sagas that "
                "run keep the one they began with: give the new one the next number."
            )
        versions[definition.version] = definition

    def of(self, saga: Saga) -> Definition:
        """That of *saga*.

        Raises:
            SagaError: the code has it no more.
        """
        try:
            return self.known[saga.name][saga.version]
        except KeyError:
            raise SagaError(
                f"Version {saga.version} of the saga {saga.name} is not defined here. Keep it for "
                "as long as a saga of that version runs."
            ) from None


@dataclass(frozen=True)
class Sagas:
    """Moves the sagas of one service on, in the transaction of the caller's connection.

    What they send is published right here: a scope of that transaction has to be open.

    Attributes:
        request: asks a task for a reply into this service's database.
        address: asks for the queue of this service that such replies, and times, come to.
    """

    app: Celery
    definitions: Definitions
    log: SagaLog
    errors: RemoteErrors
    request: Callable[..., Reply[Any]]
    address: Callable[[], str]

    def begin(self, connection: Connection, definition: Definition, id: str, data: Any) -> bool:
        """Begin a saga; returns False, and does nothing, if there is one of that id."""
        saga = Saga(id, definition.name, definition.version, State.running, dict(data))
        if not self.log.add(connection, saga):
            return False
        self._go_on(connection, saga)
        return True

    # ── what comes from outside ─────────────────────────────────────────────────────────────

    def hear(self, connection: Connection, request: UUID, outcome: Any) -> bool:
        """Take the outcome of a command; returns False if no saga has asked.

        One that comes after its time, or from a dead letter that was sent again, counts too: what
        took effect after all is undone, if its saga has been.
        """
        if (asked := self.log.asked(connection, request)) is None:
            return False
        saga = self.log.lock(connection, asked[0])
        records = self.log.records(connection, saga.id)
        record = next(each for each in records if each.id == asked[1])
        if record.status is not Status.open and record.status is not Status.failed:
            return True
        latest = [each for each in records if _same(each, record)][-1] is record
        if "error" in outcome:
            if record.status is Status.open or record.timed_out:
                self._end(connection, saga, record, Status.failed, error=outcome["error"])
        else:
            self._end(connection, saga, record, Status.done, value=outcome.get("result"))
            if latest:
                saga = self._keep(connection, saga, record, outcome.get("result"))
            else:
                log.warning(
                    "a dead letter of the saga %s was sent again, and took effect beside the "
                    "attempt that followed it: %s",
                    *(saga.id, record.place),
                )
        self._go_on(connection, self._reopened(saga, record))
        return True

    def wake(self, connection: Connection, id: str, record_id: int) -> None:
        """Take note that the time of a record is over, if it is still open."""
        saga = self.log.lock(connection, id)
        records = self.log.records(connection, id)
        record = next((each for each in records if each.id == record_id), None)
        if record is None or record.status is not Status.open:
            return
        part = self.definitions.of(saga).parts[name_of(record.place)]
        if record.kind is Kind.sleep:
            self._end(connection, saga, record, Status.done)
        elif isinstance(part, Wait) and part.default is not MISSING:
            self._end(connection, saga, record, Status.done, value=part.default)
            saga = self._keep(connection, saga, record, part.default)
        else:
            error = self.errors.to_wire(SagaTimeout(f"no outcome of {record.place} in time"))
            timed_out = record.kind is Kind.step
            self._end(connection, saga, record, Status.failed, error=error, timed_out=timed_out)
        self._go_on(connection, saga)

    def signal(self, connection: Connection, id: str, name: str, value: Any, who: str) -> None:
        """Give a signal to a saga; one that does not wait for it yet finds it when it does.

        Raises:
            SagaError: it waits for no such signal, has had it, or is over.
        """
        saga = self.log.lock(connection, id)
        part = self.definitions.of(saga).parts.get(name)
        if not isinstance(part, Wait) or saga.state.is_end:
            why = f"is {saga.state.value}" if saga.state.is_end else "waits for no such signal"
            raise SagaError(f"The saga {id} cannot be given {name!r}: it {why}.")
        records = self.log.records(connection, id)
        for record in reversed(records):
            if record.kind is Kind.wait and name_of(record.place) == name:
                if record.status is Status.open:
                    self._end(connection, saga, record, Status.done, value=value, who=who)
                    saga = self._keep(connection, saga, record, value)
                    self._go_on(connection, saga)
                    return
                if record.place == name:  # in a loop it may be waited for once more
                    raise SagaError(f"The saga {id} does not wait for {name!r} any more.")
                break
        if any(each.kind is Kind.signal and each.place == name for each in records):
            raise SagaError(f"The saga {id} has been given {name!r} already.")
        early = Record(Kind.signal, name, value=value)
        self.log.begin(connection, id, early, who=who)

    # ── what a person does ──────────────────────────────────────────────────────────────────

    def cancel(self, connection: Connection, id: str, who: str) -> None:
        """Have a saga undone.

        Raises:
            SagaError: it is over, or there is no way back any more.
        """
        saga = self.log.lock(connection, id)
        run = Run(self.definitions.of(saga), saga.data, self.log.records(connection, id))
        if saga.state.is_end or run.pivoted:
            why = f"is {saga.state.value}" if saga.state.is_end else "has passed its pivot"
            raise SagaError(f"The saga {id} {why}, and cannot be cancelled.")
        changed = replace(
            saga, state=State.compensating, back=True, cancelled=True, error=f"cancelled by {who}"
        )
        self._go_on(connection, changed)

    def resume(self, connection: Connection, id: str, who: str, place: str | None = None) -> None:
        """Have what failed tried again, and go on: all of it, or what failed at *place*.

        Raises:
            SagaError: it is not parked, or nothing failed there.
        """
        self._treat(connection, id, place, Status.again, who)

    def skip(self, connection: Connection, id: str, who: str, place: str) -> None:
        """Take what failed at *place* for done, and go on.

        Raises:
            SagaError: it is not parked, or nothing failed there.
        """
        self._treat(connection, id, place, Status.skipped, who)

    def _treat(
        self, connection: Connection, id: str, place: str | None, status: Status, who: str
    ) -> None:
        saga = self.log.lock(connection, id)
        if saga.state is not State.parked:
            raise SagaError(f"The saga {id} is {saga.state.value}, not parked: it needs nobody.")
        kinds = (Kind.undo,) if saga.back else (Kind.step, Kind.wait, Kind.undo)
        last = {(each.kind, each.place): each for each in self.log.records(connection, id)}
        failed = [
            each
            for each in last.values()
            if each.kind in kinds and each.status is Status.failed and place in (None, each.place)
        ]
        if place is not None and not failed:
            raise SagaError(f"Nothing has failed at {place!r} of the saga {id}.")
        for record in failed:
            self._end(connection, saga, record, status, who=who)
        state = State.compensating if saga.back else State.running
        self._go_on(connection, replace(saga, state=state, error=None))

    # ── going on ────────────────────────────────────────────────────────────────────────────

    def _go_on(self, connection: Connection, saga: Saga) -> None:
        """Do what follows, and write down where the saga is then."""
        while saga.state in (State.running, State.compensating):
            run, before = self._look(connection, saga)
            saga = self._judged(saga, run)
            if saga.state is not before:
                if saga.state is State.compensating:
                    continue  # nothing of what was to come is begun any more
                if saga.state is State.parked:
                    break
            if not self._apply(connection, saga, run.decisions):
                break
            saga = replace(saga, data=self.log.find(connection, saga.id).data)
        self.log.save(connection, saga)

    def _look(self, connection: Connection, saga: Saga) -> tuple[Run, State]:
        records = self.log.records(connection, saga.id)
        return Run(self.definitions.of(saga), saga.data, records), saga.state

    def _judged(self, saga: Saga, run: Run) -> Saga:
        """Where the saga is after a look at it."""
        try:
            with context.silenced(f"A condition of the saga {saga.name}"):
                progress = run.backward() if saga.back else run.forward()
        except Exception as error:
            log.exception("the saga %s is parked: its definition fails", saga.id)
            return _parked(saga, f"its definition fails: {type(error).__name__}: {error}")
        if run.stuck is not None:
            why, record = run.stuck
            return _parked(saga, f"{why}: {_text(record)}")
        if saga.back:
            end = State.cancelled if saga.cancelled else State.compensated
            return replace(saga, state=end) if progress is Progress.done else saga
        if progress is Progress.failed:
            reason = _text(_last_failure(run))
            if run.pivoted:
                return _parked(saga, f"it failed after the pivot: {reason}")
            return replace(saga, state=State.compensating, back=True, error=reason)
        if progress is Progress.done and not run.unsettled:
            return replace(saga, state=State.completed)
        return saga

    def _apply(self, connection: Connection, saga: Saga, decisions: list[Decision]) -> bool:
        """Do what was decided; returns whether it is worth another look at once."""
        again = False
        for decision in decisions:
            match decision:
                case Ask():
                    self._ask(connection, saga, decision)
                case Note(kind, place, value):
                    record = Record(kind, place, status=Status.done, value=value)
                    self.log.begin(connection, saga.id, record)
                case Await(part, place):
                    again = self._await(connection, saga, part, place) or again
                case Rest(part, place):
                    record = Record(Kind.sleep, place)
                    self._timed(connection, saga, record, part.seconds)
                case Drop(record):
                    self._end(connection, saga, record, Status.dropped)
        return again

    def _ask(self, connection: Connection, saga: Saga, ask: Ask) -> None:
        step, task = ask.step, ask.step.undo if ask.undo else ask.step.task
        options = {**step.options, **({"countdown": ask.delay} if ask.delay else {})}
        reply = self.request(task, ask.args, dict(ask.kwargs), address="durable", **options)
        kind = Kind.undo if ask.undo else Kind.step
        record = Record(kind, ask.place, ask.attempt)
        timeout = None if ask.undo else step.timeout
        self._timed(connection, saga, record, timeout, UUID(reply.correlation_id))

    def _await(self, connection: Connection, saga: Saga, part: Wait, place: str) -> bool:
        """Wait for a signal; True if it was given before."""
        records = self.log.records(connection, saga.id)
        early = [r for r in records if r.kind is Kind.signal and r.status is Status.open]
        for signal in early:
            if signal.place == part.name:
                self._end(connection, saga, signal, Status.done, value=signal.value)
                record = Record(Kind.wait, place, status=Status.done, value=signal.value)
                self.log.begin(connection, saga.id, record)
                self._keep(connection, saga, record, signal.value)
                return True
        self._timed(connection, saga, Record(Kind.wait, place), part.timeout)
        return False

    def _timed(
        self,
        connection: Connection,
        saga: Saga,
        record: Record,
        seconds: float | None,
        request: UUID | None = None,
    ) -> None:
        """Write down something that is open, and have the saga told when its time is over."""
        id_ = self.log.begin(connection, saga.id, record, request=request, seconds=seconds)
        if seconds is not None:
            self.app.send_task(
                *(TIME_TASK, (saga.id, id_)),
                countdown=seconds,
                queue=self.address(),
                ignore_result=True,
            )

    def _end(
        self, connection: Connection, saga: Saga, record: Record, status: Status, **how: Any
    ) -> None:
        self.log.end(connection, saga.id, record.id, status, **how)

    def _keep(self, connection: Connection, saga: Saga, record: Record, value: Any) -> Saga:
        """Let the saga know a result or a signal from now on, if its part says so."""
        part = self.definitions.of(saga).parts[name_of(record.place)]
        if record.kind not in (Kind.step, Kind.wait) or not isinstance(part, Step | Wait):
            return saga
        if part.keep is None:
            return saga
        saga = replace(saga, data={**saga.data, part.keep: value})
        self.log.save(connection, saga)
        return saga

    def _reopened(self, saga: Saga, record: Record) -> Saga:
        """A saga that was undone, and has something to undo after all."""
        if saga.state in (State.compensated, State.cancelled) and record.kind is Kind.step:
            return replace(saga, state=State.compensating)
        return saga


def _parked(saga: Saga, why: str) -> Saga:
    return replace(saga, state=State.parked, error=why)


def _same(one: Record, other: Record) -> bool:
    return (one.kind, one.place) == (other.kind, other.place)


def _last_failure(run: Run) -> Record | None:
    failed = [each for each in run.records if each.status is Status.failed]
    return max(failed, key=lambda each: each.ended or 0, default=None)


def _text(record: Record | None) -> str:
    if record is None:
        return "a loop went round too often"
    error = record.value
    what = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else "no outcome"
    return redaction.redact(f"{record.place}: {what}")
