"""Sagas: each transition is one transaction, with the commands that it sends.

A command is an ordinary request, its outcome an ordinary reply, and a time-out a message that waits
in the outbox until it is due. Whichever worker gets one of them locks the saga, writes down what
has come, looks what follows, and sends that. There is nobody whose death would matter.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from celery import Celery
from sqlalchemy import Connection

from celery_eda import context, redaction
from celery_eda.errors import SagaError, SagaTimeout
from celery_eda.remote_errors import RemoteErrors
from celery_eda.reply import Reply
from celery_eda.saga_definition import MISSING, Data, Definition, Lock, Step, SubSaga, Wait
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
    name_of,
)
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
    locks: SagaLocks
    errors: RemoteErrors
    request: Callable[..., Reply[Any]]
    address: Callable[[], str]

    def begin(self, connection: Connection, definition: Definition, id: str, data: Any) -> bool:
        """Begin a saga; returns False, and does nothing, if there is one of that id.

        Raises:
            SagaError: the id is too long.
        """
        if len(id.encode()) > KEY_BYTES:
            raise SagaError(f"The id {id[:40]!r}… is longer than {KEY_BYTES} bytes.")
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
        self._take(connection, saga, asked[1], outcome)
        return True

    def tell(self, connection: Connection, news: str, id: str, record: int) -> None:
        """Tell a saga what a record of it has waited for; it may be too late for that."""
        saga = self.log.lock(connection, id)
        if News(news) is News.end:
            self._take_end(connection, saga, record)
            return
        found = next((e for e in self.log.records(connection, id) if e.id == record), None)
        if found is None or found.status is not Status.open:
            return
        if News(news) is News.lock:
            self._end(connection, saga, found, Status.done, value=found.value)
        else:
            saga = self._time_is_over(connection, saga, found)
        self._go_on(connection, saga)

    def _take(self, connection: Connection, saga: Saga, record_id: int, outcome: Any) -> None:
        """Write down the outcome of a command, or of a sub-saga, and go on."""
        records = self.log.records(connection, saga.id)
        record = next(each for each in records if each.id == record_id)
        if record.status is not Status.open and record.status is not Status.failed:
            return
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

    def _take_end(self, connection: Connection, saga: Saga, record: int) -> None:
        """Take the end of a sub-saga for the outcome of what it was begun, or undone, by."""
        part = self.log.sub_saga(connection, record)
        if part is None or not part.state.is_end:
            return
        records = self.log.records(connection, saga.id)
        undone = any(each.id == record and each.kind is Kind.undo for each in records)
        if undone == (part.state is not State.completed):
            outcome: dict[str, Any] = {"result": None if undone else dict(part.data)}
        else:
            error = SagaError(f"{part.id} is {part.state.value}: {part.error}")
            outcome = {"error": self.errors.to_wire(error)}
        self._take(connection, saga, record, outcome)

    def _time_is_over(self, connection: Connection, saga: Saga, record: Record) -> Saga:
        part = self.definitions.of(saga).parts[name_of(record.place)]
        if record.kind is Kind.sleep:
            self._end(connection, saga, record, Status.done)
        elif isinstance(part, Wait) and part.default is not MISSING:
            self._end(connection, saga, record, Status.done, value=part.default)
            return self._keep(connection, saga, record, part.default)
        else:
            error = self.errors.to_wire(SagaTimeout(f"no outcome of {record.place} in time"))
            timed_out = record.kind is Kind.step
            self._end(connection, saga, record, Status.failed, error=error, timed_out=timed_out)
        return saga

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
        self._cancel(connection, self.log.lock(connection, id), who)

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
        kinds = (Kind.undo,) if saga.back else (Kind.step, Kind.lock, Kind.wait, Kind.undo)
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

    def _cancel(self, connection: Connection, saga: Saga, who: str) -> None:
        run = Run(self.definitions.of(saga), saga.data, self.log.records(connection, saga.id))
        if saga.state.is_end or run.pivoted:
            why = f"is {saga.state.value}" if saga.state.is_end else "has passed its pivot"
            raise SagaError(f"The saga {saga.id} {why}, and cannot be cancelled.")
        changed = replace(
            saga, state=State.compensating, back=True, cancelled=True, error=f"cancelled by {who}"
        )
        self._go_on(connection, changed)

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
        if saga.state.is_end:
            self._leave(connection, saga)

    def _leave(self, connection: Connection, saga: Saga) -> None:
        """Tell those who wait for the end of a saga."""
        if saga.record is not None:
            self._send(News.end, self.log.saga_of(connection, saga.record), saga.record)
        if saga.root is None:
            self.release(connection, saga.id)

    def release(self, connection: Connection, owner: str) -> None:
        """Let go of the locks of a saga, and tell those that have them then."""
        for heir, record in self.locks.release(connection, owner):
            self._send(News.lock, heir, record)

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
            reason = run.failure or _text(_last_failure(run))
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
                case Stop(record):
                    self._stop(connection, saga, record)
                case Hold(part, place, key):
                    again = self._hold(connection, saga, part, place, key) or again
                case Await(part, place):
                    again = self._await(connection, saga, part, place) or again
                case Rest(part, place):
                    record = Record(Kind.sleep, place)
                    self._timed(connection, saga, record, part.seconds)
                case Drop(record):
                    self._end(connection, saga, record, Status.dropped)
        return again

    def _ask(self, connection: Connection, saga: Saga, ask: Ask) -> None:
        step = ask.step
        record = Record(Kind.undo if ask.undo else Kind.step, ask.place, ask.attempt)
        timeout = None if ask.undo else step.timeout
        if isinstance(step, SubSaga):
            waiting = self._timed(connection, saga, record, timeout)
            if ask.undo:
                self._undo_part(connection, saga, ask.undo, waiting)
            else:
                data = ask.kwargs if step.give else ask.args[0]
                self._begin_part(connection, saga, step, record, data, waiting)
            return
        task = step.undo if ask.undo else step.task
        options = {**step.options, **({"countdown": ask.delay} if ask.delay else {})}
        reply = self.request(task, ask.args, dict(ask.kwargs), address="durable", **options)
        self._timed(connection, saga, record, timeout, UUID(reply.correlation_id))

    # ── sub-sagas: whoever holds the lock of a saga may take those of its parts ─────────────

    def _begin_part(
        self,
        connection: Connection,
        saga: Saga,
        part: SubSaga,
        record: Record,
        data: Data,
        waiting: int,
    ) -> None:
        definition = part.definition
        begun = Saga(
            *(_part_id(saga, record), definition.name, definition.version, State.running),
            *(dict(data),),
            root=saga.root or saga.id,
            record=waiting,
        )
        self.log.add(connection, begun)
        self._go_on(connection, begun)

    def _undo_part(self, connection: Connection, saga: Saga, done: Record, waiting: int) -> None:
        """Have a sub-saga undone that is completed; one behind its pivot cannot be."""
        part = replace(self.log.lock(connection, _part_id(saga, done)), record=waiting)
        run = Run(self.definitions.of(part), part.data, self.log.records(connection, part.id))
        if part.state is State.completed and not run.pivoted:
            part = replace(
                part, state=State.compensating, back=True, error=f"undone with {saga.id}"
            )
        self._go_on(connection, part)

    def _stop(self, connection: Connection, saga: Saga, record: Record) -> None:
        """Have a sub-saga cancelled that is on its way; what cannot be comes to its end."""
        part = self.log.lock(connection, _part_id(saga, record))
        if not part.back and not part.state.is_end:
            with suppress(SagaError):
                self._cancel(connection, part, f"saga {saga.id}")

    # ── waiting ─────────────────────────────────────────────────────────────────────────────

    def _hold(self, connection: Connection, saga: Saga, part: Lock, place: str, key: str) -> bool:
        """Take a lock, or wait for it; True if it was free."""
        waiting = self._timed(connection, saga, Record(Kind.lock, place, value=key), part.timeout)
        owner = saga.root or saga.id
        if not self.locks.take(connection, key, owner, saga=saga.id, record=waiting):
            return False
        self.log.end(connection, saga.id, waiting, Status.done, value=key)
        return True

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
    ) -> int:
        """Write down something that is open, and have the saga told when its time is over.

        Returns:
            The id of the record.
        """
        id_ = self.log.begin(connection, saga.id, record, request=request, seconds=seconds)
        if seconds is not None:
            self._send(News.time, saga.id, id_, countdown=seconds)
        return id_

    def _send(self, news: News, saga: str, record: int, **options: Any) -> None:
        self.app.send_task(
            *(NEWS_TASK, (news.value, saga, record)),
            queue=self.address(),
            ignore_result=True,
            **options,
        )

    def _end(
        self, connection: Connection, saga: Saga, record: Record, status: Status, **how: Any
    ) -> None:
        self.log.end(connection, saga.id, record.id, status, **how)

    def _keep(self, connection: Connection, saga: Saga, record: Record, value: Any) -> Saga:
        """Let the saga know a result or a signal from now on, if its part says so."""
        part = self.definitions.of(saga).parts[name_of(record.place)]
        if record.kind is Kind.undo or not isinstance(part, Step | SubSaga | Wait):
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


def _part_id(saga: Saga, record: Record) -> str:
    """What the sub-saga of *record* is called."""
    id = f"{saga.id}/{record.place}" + (f"#{record.attempt}" if record.attempt > 1 else "")
    return id if len(id.encode()) <= KEY_BYTES else str(uuid5(NAMESPACE_URL, id))


def _parked(saga: Saga, why: str) -> Saga:
    return replace(saga, state=State.parked, error=why)


def _same(one: Record, other: Record) -> bool:
    return (one.kind, one.place) == (other.kind, other.place)


def _last_failure(run: Run) -> Record:
    failed = [each for each in run.records if each.status is Status.failed]
    return max(failed, key=lambda each: each.ended or 0)


def _text(record: Record) -> str:
    error = record.value
    what = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else "no outcome"
    return redaction.redact(f"{record.place}: {what}")
