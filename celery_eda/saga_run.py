"""One look at a saga: from its definition and what is written down, what is to be done next.

Nothing is done here, and nothing remembered: the same record gives the same decisions, whoever
looks at it, on whichever worker. What was chosen once is in the record and is not chosen anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from celery_eda.errors import SagaError, SagaTimeout
from celery_eda.saga_definition import (
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
)
from celery_eda.tables import KEY_BYTES


class Kind(str, Enum):
    """What a record is about."""

    step = "step"
    undo = "undo"
    lock = "lock"
    wait = "wait"
    sleep = "sleep"
    signal = "signal"
    choice = "choice"
    taken = "taken"
    round = "round"
    pivot = "pivot"


class Status(str, Enum):
    """What has become of it.

    ``open``: nothing yet. ``done``. ``failed``: with an error, or its time was over. ``skipped``:
    by a person, as if it were done. ``again``: a person has it tried again. ``dropped``: nobody
    waits for it any more.
    """

    open = "open"
    done = "done"
    failed = "failed"
    skipped = "skipped"
    again = "again"
    dropped = "dropped"


@dataclass(frozen=True)
class Record:
    """What is written down of one attempt at one part.

    Attributes:
        place: the name of the part, with the rounds of its loops.
        ended: counts the ends of all records of the saga; None as long as it is open.
        value: the result, the signal, what was chosen, or the error.
        timed_out: whether it failed because its time was over: an outcome is still to come.
    """

    kind: Kind
    place: str
    attempt: int = 1
    status: Status = Status.open
    ended: int | None = None
    value: Any = None
    timed_out: bool = False
    id: int = 0


class Progress(Enum):
    """How far a part has come."""

    busy = "busy"
    done = "done"
    failed = "failed"


@dataclass(frozen=True)
class Ask:
    """Have a step done, for the first time or again.

    Attributes:
        undo: what it is to undo instead, if it is.
    """

    step: Step | SubSaga
    place: str
    attempt: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    delay: float = 0.0
    undo: Record | None = None


@dataclass(frozen=True)
class Stop:
    """Have a sub-saga cancelled of which nobody wants anything any more."""

    record: Record


@dataclass(frozen=True)
class Hold:
    """Take a lock, or wait for it."""

    part: Lock
    place: str
    key: str


@dataclass(frozen=True)
class Await:
    """Begin to wait for a signal."""

    part: Wait
    place: str


@dataclass(frozen=True)
class Rest:
    """Begin to sleep."""

    part: Sleep
    place: str


@dataclass(frozen=True)
class Note:
    """Write down what was decided: a choice, which branches are taken, a round, the pivot."""

    kind: Kind
    place: str
    value: Any = None


@dataclass(frozen=True)
class Drop:
    """Stop waiting."""

    record: Record


Decision = Ask | Stop | Hold | Await | Rest | Note | Drop


@dataclass
class Run:
    """One look at one saga.

    Attributes:
        decisions: what is to be done, in this order.
        failure: why it cannot go on, if no record says so.
        stuck: why it cannot be undone, and which record says so.
        unsettled: whether something is under way that no part waits for: what a branch that was
            given up did is still to be undone.
    """

    definition: Definition
    data: Data
    records: Sequence[Record]
    decisions: list[Decision] = field(default_factory=list)
    failure: str | None = None
    stuck: tuple[str, Record] | None = None
    unsettled: bool = False

    def __post_init__(self) -> None:
        self._last: dict[tuple[Kind, str], Record] = {
            (each.kind, each.place): each for each in self.records
        }

    # ── forward ─────────────────────────────────────────────────────────────────────────────

    def forward(self) -> Progress:
        """Go on as far as possible."""
        return self._block(self.definition.body, "")

    @property
    def pivoted(self) -> bool:
        """Whether there is no way back any more."""
        return any(kind is Kind.pivot for kind, _ in self._last)

    def _block(self, block: Block, rounds: str) -> Progress:
        for part in block.parts:
            if (progress := self._part(part, rounds)) is not Progress.done:
                return progress
        return Progress.done

    def _part(self, part: Part, rounds: str) -> Progress:
        place = f"{part.name}{rounds}"
        match part:
            case Step() | SubSaga():
                return self._step(part, place)
            case Lock():
                return self._lock(part, place)
            case Wait():
                return self._wait(part, place)
            case Sleep():
                return self._sleep(part, place)
            case Pivot():
                self._noted(Kind.pivot, place, lambda: True)
                return Progress.done
            case Fail(why=why):
                self.failure = f"{place}: {why}"
                return Progress.failed
            case Choice():
                return self._choice(part, place, rounds)
            case Loop():
                return self._loop(part, place, rounds)
            case Parallel():
                return self._parallel(part, rounds)

    def _step(self, step: Step | SubSaga, place: str) -> Progress:
        record = self._last.get((Kind.step, place))
        if record is None:
            return self._ask(step, place, 1)
        match record.status:
            case Status.open:
                return Progress.busy
            case Status.done | Status.skipped:
                return Progress.done
            case Status.again:
                return self._ask(step, place, record.attempt + 1)
        return self._tried_again(step, record)

    def _tried_again(
        self, step: Step | SubSaga, record: Record, undo: Record | None = None
    ) -> Progress:
        """Ask again if the policy wants that; what may still take effect is not asked again."""
        error = record.value if isinstance(record.value, Exception) else SagaTimeout(record.place)
        delay = None
        if isinstance(step, Step) and step.retry is not None and not record.timed_out:
            delay = step.retry(record.attempt, error)
        if delay is None:
            return Progress.failed
        return self._ask(step, record.place, record.attempt + 1, delay, undo)

    def _ask(
        self,
        step: Step | SubSaga,
        place: str,
        attempt: int,
        delay: float = 0.0,
        undo: Record | None = None,
    ) -> Progress:
        give = step.give_undo if undo and isinstance(step, Step) else step.give
        data = dict(self.data)
        args, kwargs = ((), dict(give(data))) if give else ((data,), {})
        self.decisions.append(Ask(step, place, attempt, args, kwargs, delay, undo))
        return Progress.busy

    def _wait(self, part: Wait, place: str) -> Progress:
        record = self._last.get((Kind.wait, place))
        if record is None or record.status is Status.again:
            self.decisions.append(Await(part, place))
            return Progress.busy
        return _progress_of(record)

    def _lock(self, part: Lock, place: str) -> Progress:
        record = self._last.get((Kind.lock, place))
        if record is None or record.status is Status.again:
            key = str(part.key(self.data))
            if len(key.encode()) > KEY_BYTES:
                raise SagaError(f"the key of {place} is longer than {KEY_BYTES} bytes")
            self.decisions.append(Hold(part, place, key))
            return Progress.busy
        return _progress_of(record)

    def _sleep(self, part: Sleep, place: str) -> Progress:
        record = self._last.get((Kind.sleep, place))
        if record is None:
            self.decisions.append(Rest(part, place))
            return Progress.busy
        return Progress.busy if record.status is Status.open else Progress.done

    def _choice(self, choice: Choice, place: str, rounds: str) -> Progress:
        def choose() -> int | None:
            held = (n for n, (condition, _) in enumerate(choice.cases) if condition(self.data))
            return next(held, None)

        chosen = self._noted(Kind.choice, place, choose)
        return Progress.done if chosen is None else self._block(choice.cases[chosen][1], rounds)

    def _loop(self, loop: Loop, place: str, rounds: str) -> Progress:
        for number in range(1, loop.limit + 1):
            inside = f"{rounds}[{number}]"
            if not self._noted(Kind.round, f"{loop.name}{inside}", lambda: loop.again(self.data)):
                return Progress.done
            if (progress := self._block(loop.body, inside)) is not Progress.done:
                return progress
        more = self._noted(
            Kind.round, f"{loop.name}{rounds}[{loop.limit + 1}]", lambda: loop.again(self.data)
        )
        if not more:
            return Progress.done
        self.failure = f"{loop.name}{rounds}: it went round more than {loop.limit} times"
        return Progress.failed

    def _parallel(self, parallel: Parallel, rounds: str) -> Progress:
        before, place = len(self.decisions), f"{parallel.name}{rounds}"
        ends, asked = [], []
        for branch in parallel.branches:
            begin = len(self.decisions)
            ends.append(self._block(branch, rounds))
            asked.append(self.decisions[begin:])
        done = [number for number, end in enumerate(ends) if end is Progress.done]
        if len(done) < parallel.need and (Kind.taken, place) not in self._last:
            possible = len(ends) - ends.count(Progress.failed)
            return Progress.busy if possible >= parallel.need else Progress.failed
        # What the others were to do is not begun any more, and what they have done is undone.
        del self.decisions[before:]
        self.failure = None
        taken = done
        if parallel.need < len(ends):
            taken = self._noted(Kind.taken, place, lambda: done[: parallel.need])
        for number, branch in enumerate(parallel.branches):
            if number in taken:
                self.decisions += asked[number]
            elif not self._undone(names_in(branch), rounds):
                self.unsettled = True
        return Progress.done

    # ── back ────────────────────────────────────────────────────────────────────────────────

    def backward(self) -> Progress:
        """Have everything undone that was done, the latest first."""
        if self._undone(frozenset(self.definition.parts), ""):
            return Progress.done
        return Progress.failed if self.stuck else Progress.busy

    def _undone(self, names: frozenset[str], rounds: str) -> bool:
        """Whether all that these parts did is undone; if not, go on with that.

        What is still under way is waited for: nobody knows yet whether it has to be undone.
        """
        here = [each for each in self._last.values() if _is_of(each.place, names, rounds)]
        for record in here:
            if record.kind in (Kind.lock, Kind.wait, Kind.sleep) and record.status is Status.open:
                self.decisions.append(Drop(record))
        steps = [each for each in here if each.kind is Kind.step]
        under_way = [each for each in steps if each.status is Status.open or each.timed_out]
        for record in under_way:
            if isinstance(self.definition.parts[name_of(record.place)], SubSaga):
                self.decisions.append(Stop(record))
        done = [each for each in steps if each.status is Status.done]
        for record in sorted(done, key=lambda each: each.ended or 0, reverse=True):
            if not self._is_undone(record):
                return False
        return not under_way

    def _is_undone(self, done: Record) -> bool:
        step = self.definition.parts[name_of(done.place)]
        assert isinstance(step, Step | SubSaga), "only steps are recorded as such"
        if isinstance(step, Step) and step.undo is None:
            return True
        record = self._last.get((Kind.undo, done.place))
        if record is None or record.status is Status.again:
            attempt = record.attempt + 1 if record else 1
            self._ask(step, done.place, attempt, undo=done)
            return False
        if record.status is Status.failed:
            if self._tried_again(step, record, undo=done) is Progress.failed:
                self.stuck = f"{done.place} cannot be undone", record
            return False
        return record.status is not Status.open

    def _noted(self, kind: Kind, place: str, decide: Callable[[], Any]) -> Any:
        """What was decided there; decided now if it was not."""
        if (record := self._last.get((kind, place))) is None:
            value = decide()
            self.decisions.append(Note(kind, place, value))
            record = self._last[kind, place] = Record(kind, place, status=Status.done, value=value)
        return record.value


def _progress_of(record: Record) -> Progress:
    if record.status in (Status.done, Status.skipped):
        return Progress.done
    return Progress.busy if record.status is Status.open else Progress.failed


def name_of(place: str) -> str:
    """The name of the part at *place*."""
    return place.partition("[")[0]


def names_in(block: Block) -> frozenset[str]:
    """The names of all parts of *block*, those inside of others too."""
    return frozenset(_names_in(block))


def _names_in(block: Block) -> Iterator[str]:
    for part in block.parts:
        yield part.name
        match part:
            case Choice():
                inner = [case for _, case in part.cases]
            case Loop():
                inner = [part.body]
            case Parallel():
                inner = list(part.branches)
            case _:
                continue
        for each in inner:
            yield from _names_in(each)


def _is_of(place: str, names: frozenset[str], rounds: str) -> bool:
    name = name_of(place)
    return name in names and place.removeprefix(name).startswith(rounds)
