"""The interpreter of sagas: from a definition and the history so far to the next decisions.

Interpreting has no side effect and no memory: the same records give the same plan on every worker.
A choice that was recorded once is read from its record and is not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from celery_eda.core.limits import KEY_BYTES
from celery_eda.errors import SagaError, SagaTimeout
from celery_eda.sagas.definition import (
    Block,
    Choice,
    Data,
    Definition,
    Fail,
    Lock,
    Loop,
    Parallel,
    Part,
    Pivot,
    Sleep,
    Step,
    SubSaga,
    Wait,
    names_in,
)
from celery_eda.sagas.plan import (
    BUSY,
    DONE,
    FAILED,
    AwaitSignal,
    CancelSubSaga,
    Plan,
    Progress,
    RecordChoice,
    SendCommand,
    StartTimer,
    StopWaiting,
    TakeLock,
)
from celery_eda.sagas.record import Kind, Record, Status, part_name


@dataclass(frozen=True)
class Interpreter:
    """Interprets the definition of one saga, given its data and its records.

    Attributes:
        records: the history, in the order in which its records began.
    """

    definition: Definition
    data: Data
    records: Sequence[Record]

    @cached_property
    def _latest(self) -> Mapping[tuple[Kind, str], Record]:
        return {(each.kind, each.path): each for each in self.records}

    @property
    def pivoted(self) -> bool:
        """True if the records show that the point of no return was passed."""
        return any(each.kind is Kind.pivot for each in self.records)

    # ── forward ─────────────────────────────────────────────────────────────────────────────

    def forward(self) -> Plan:
        """Plan the next steps of the saga."""
        return self._block(self.definition.body, "")

    def _block(self, block: Block, rounds: str) -> Plan:
        plan = DONE
        for part in block.parts:
            plan = plan.followed_by(self._part(part, rounds))
            if plan.progress is not Progress.done:
                break
        return plan

    def _part(self, part: Part, rounds: str) -> Plan:
        path = f"{part.name}{rounds}"
        match part:
            case Step() | SubSaga():
                return self._step(part, path)
            case Lock():
                return self._lock(part, path)
            case Wait():
                return self._wait(part, path)
            case Sleep():
                return self._sleep(part, path)
            case Pivot():
                _, recorded = self._chosen(Kind.pivot, path, lambda: True)
                return recorded
            case Fail(why=why):
                return Plan(Progress.failed, failure=f"{path}: {why}")
            case Choice():
                return self._choice(part, path, rounds)
            case Loop():
                return self._loop(part, rounds)
            case Parallel():
                return self._parallel(part, path, rounds)

    def _step(self, step: Step | SubSaga, path: str) -> Plan:
        record = self._latest.get((Kind.step, path))
        if record is None:
            return self._command(step, path, 1)
        match record.status:
            case Status.open:
                return BUSY
            case Status.done | Status.skipped:
                return DONE
            case Status.again:
                return self._command(step, path, record.attempt + 1)
        return self._retry(step, record)

    def _retry(self, step: Step | SubSaga, record: Record, undo: Record | None = None) -> Plan:
        """Send the command again if the step's policy allows it.

        A step that timed out is not sent again: the first attempt may still take effect.
        """
        error = record.value if isinstance(record.value, Exception) else SagaTimeout(record.path)
        delay = None
        if isinstance(step, Step) and step.retry is not None and not record.timed_out:
            delay = step.retry(record.attempt, error)
        if delay is None:
            return FAILED
        return self._command(step, record.path, record.attempt + 1, delay, undo)

    def _command(
        self,
        step: Step | SubSaga,
        path: str,
        attempt: int,
        delay: float = 0.0,
        undo: Record | None = None,
    ) -> Plan:
        give = step.give_undo if undo and isinstance(step, Step) else step.give
        data = dict(self.data)
        args, kwargs = ((), dict(give(data))) if give else ((data,), {})
        command = SendCommand(step, path, attempt, args, kwargs, delay, undo)
        return Plan(Progress.busy, (command,))

    def _wait(self, part: Wait, path: str) -> Plan:
        record = self._latest.get((Kind.wait, path))
        if record is None or record.status is Status.again:
            return Plan(Progress.busy, (AwaitSignal(part, path),))
        return _plan_of(record)

    def _lock(self, part: Lock, path: str) -> Plan:
        record = self._latest.get((Kind.lock, path))
        if record is None or record.status is Status.again:
            key = str(part.key(self.data))
            if len(key.encode()) > KEY_BYTES:
                raise SagaError(f"the key of {path} is longer than {KEY_BYTES} bytes")
            return Plan(Progress.busy, (TakeLock(part, path, key),))
        return _plan_of(record)

    def _sleep(self, part: Sleep, path: str) -> Plan:
        record = self._latest.get((Kind.sleep, path))
        if record is None:
            return Plan(Progress.busy, (StartTimer(part, path),))
        return BUSY if record.status is Status.open else DONE

    def _choice(self, choice: Choice, path: str, rounds: str) -> Plan:
        def choose() -> int | None:
            held = (n for n, (condition, _) in enumerate(choice.cases) if condition(self.data))
            return next(held, None)

        chosen, recorded = self._chosen(Kind.choice, path, choose)
        if chosen is None:
            return recorded
        return recorded.followed_by(self._block(choice.cases[chosen][1], rounds))

    def _loop(self, loop: Loop, rounds: str) -> Plan:
        plan = DONE
        for number in range(1, loop.limit + 2):
            inside = f"{rounds}[{number}]"
            again, recorded = self._chosen(
                Kind.round, f"{loop.name}{inside}", lambda: loop.again(self.data)
            )
            plan = plan.followed_by(recorded)
            if not again:
                return plan
            if number <= loop.limit:
                plan = plan.followed_by(self._block(loop.body, inside))
                if plan.progress is not Progress.done:
                    return plan
        failure = f"{loop.name}{rounds}: more than {loop.limit} rounds"
        return plan.followed_by(Plan(Progress.failed, failure=failure))

    def _parallel(self, parallel: Parallel, path: str, rounds: str) -> Plan:
        plans = [self._block(branch, rounds) for branch in parallel.branches]
        done = [n for n, plan in enumerate(plans) if plan.progress is Progress.done]
        if len(done) < parallel.need and (Kind.taken, path) not in self._latest:
            return _all_of(plans, parallel.need)
        taken, plan = done, DONE
        if parallel.need < len(plans):
            taken, plan = self._chosen(Kind.taken, path, lambda: done[: parallel.need])
        # Branches that are not taken begin nothing more, and their completed steps are compensated.
        for number, branch in enumerate(parallel.branches):
            if number in taken:
                plan = plan.followed_by(plans[number])
            else:
                plan = plan.followed_by(self._abandoned(branch, rounds, plans[number]))
        return replace(plan, progress=Progress.done, failure=None)

    def _abandoned(self, branch: Block, rounds: str, plan: Plan) -> Plan:
        """Compensate a *branch* that is not taken, instead of following its *plan*."""
        undoing = self._undo(names_in(branch), rounds)
        return Plan(
            Progress.done,
            undoing.decisions,
            stuck=undoing.stuck or plan.stuck,
            unsettled=undoing.progress is not Progress.done,
        )

    # ── back ────────────────────────────────────────────────────────────────────────────────

    def backward(self) -> Plan:
        """Plan the compensation of the whole saga, the latest step first."""
        return self._undo(frozenset(self.definition.parts), "")

    def _undo(self, names: frozenset[str], rounds: str) -> Plan:
        """Plan the compensation of the parts with these *names*.

        A step that is still in progress is awaited: its outcome decides whether there is anything
        to compensate.
        """
        here = [each for each in self._latest.values() if _is_of(each.path, names, rounds)]
        steps = [each for each in here if each.kind is Kind.step]
        under_way = [each for each in steps if each.status is Status.open or each.timed_out]
        plan = Plan(
            Progress.busy if under_way else Progress.done,
            (
                *(StopWaiting(each) for each in here if _is_open_wait(each)),
                *(CancelSubSaga(each) for each in under_way if self._is_sub_saga(each)),
            ),
        )
        done = [each for each in steps if each.status is Status.done]
        for record in sorted(done, key=lambda each: each.ended or 0, reverse=True):
            undoing = self._undo_step(record)
            if undoing.progress is not Progress.done:
                return plan.followed_by(undoing)
        return plan

    def _undo_step(self, done: Record) -> Plan:
        step = self.definition.parts[done.part]
        assert isinstance(step, Step | SubSaga), "only steps are recorded as such"
        if isinstance(step, Step) and step.undo is None:
            return DONE
        record = self._latest.get((Kind.undo, done.path))
        if record is None:
            return self._command(step, done.path, 1, undo=done)
        match record.status:
            case Status.open:
                return BUSY
            case Status.again:
                return self._command(step, done.path, record.attempt + 1, undo=done)
            case Status.failed:
                plan = self._retry(step, record, undo=done)
                if plan.progress is Progress.failed:
                    return Plan(Progress.failed, stuck=(f"{done.path} cannot be undone", record))
                return plan
        return DONE

    def _is_sub_saga(self, record: Record) -> bool:
        return isinstance(self.definition.parts[record.part], SubSaga)

    def _chosen(self, kind: Kind, path: str, choose: Callable[[], Any]) -> tuple[Any, Plan]:
        """The recorded choice; if there is none, a new one and the plan to record it."""
        if (record := self._latest.get((kind, path))) is not None:
            return record.value, DONE
        value = choose()
        return value, Plan(Progress.done, (RecordChoice(kind, path, value),))


def _plan_of(record: Record) -> Plan:
    match record.status:
        case Status.done | Status.skipped:
            return DONE
        case Status.open:
            return BUSY
    return FAILED


def _all_of(plans: Sequence[Plan], need: int) -> Plan:
    """The *plans* of parallel branches; they have failed if fewer than *need* can still be done."""
    failed = [plan for plan in plans if plan.progress is Progress.failed]
    together = DONE
    for plan in plans:
        together = together.followed_by(plan)
    reasons = [plan.failure for plan in failed if plan.failure is not None]
    return replace(
        together,
        progress=Progress.busy if len(plans) - len(failed) >= need else Progress.failed,
        failure=reasons[-1] if reasons else None,
    )


def _is_open_wait(record: Record) -> bool:
    return record.kind in (Kind.lock, Kind.wait, Kind.sleep) and record.status is Status.open


def _is_of(path: str, names: frozenset[str], rounds: str) -> bool:
    name = part_name(path)
    return name in names and path.removeprefix(name).startswith(rounds)
