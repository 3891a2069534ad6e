"""Tests of sagas in memory: no broker, no worker, and a simulated clock.

    test = SagaTest(order)
    test.fails("make", OutOfStock())
    end = test.run({"order": 7})
    assert end.state == "compensated"
    assert end.calls == ["pay", "make", "undo pay"]

The test runs the real engine on a SQLite database in memory, and is deterministic.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, StaticPool, create_engine

from celery_eda.databases import Tables, dialect_of
from celery_eda.errors import SagaError
from celery_eda.requests import RemoteErrors
from celery_eda.sagas.coordinator import Coordinator
from celery_eda.sagas.definition import Definition, Definitions, Step, SubSaga
from celery_eda.sagas.engine import SagaEngine
from celery_eda.sagas.locks import SagaLocks
from celery_eda.sagas.messages import Wakeup
from celery_eda.sagas.saga import Saga
from celery_eda.sagas.store import HistoryEntry, SagaStore

#: Transitions after which a run fails.
MOST = 10_000
ID, OTHER = "test", "another"


@dataclass(frozen=True)
class End:
    """The end of a run.

    Attributes:
        state: of the saga; ``running`` if the saga still waits, for a signal or a late outcome.
        calls: the steps in the order of their calls, ``undo <step>`` for a compensation.
        given: the keyword arguments of each call, or its only argument.
        error: the reason why the saga was compensated or parked.
        seconds: the time that has passed on the simulated clock.
    """

    state: str
    data: Mapping[str, Any]
    calls: list[str]
    given: list[Any]
    error: str | None
    seconds: float
    history: list[HistoryEntry]


class _SimulatedStore(SagaStore):
    """The store of a simulation, whose timers end on its own clock, not on the database's."""

    def seconds_until_due(self, connection: Connection, record: int) -> float | None:
        return 0.0


@dataclass
class SagaTest:
    """One run of one saga.

    Attributes:
        crashing: True to roll back and repeat each transition, as after the death of a worker
            before its commit, and to deliver each message twice.
        results: the result of each step, or a function of its arguments; see :meth:`returns`.
    """

    saga: Saga
    crashing: bool = False
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        engine = create_engine("sqlite://", poolclass=StaticPool)
        dialect, tables = dialect_of(engine.url, claim_timeout=60), Tables.on()
        dialect.configure_engine(engine, 60)
        for table in (tables.sagas, tables.saga_steps, tables.saga_locks):
            table.create(engine)
        errors = RemoteErrors()
        definitions = Definitions()
        for each in _with_parts(self.saga.definition):
            definitions.add(each)
        self._engine, self._errors = engine, errors
        saga_engine = SagaEngine(
            definitions=definitions,
            store=_SimulatedStore(tables.sagas, tables.saga_steps, dialect, errors),
            locks=SagaLocks(tables.saga_locks, dialect),
            messages=self,
        )
        self._sagas = Coordinator(saga_engine, errors)
        self._failures: dict[str, deque[Exception | None]] = defaultdict(deque)
        self._late: set[str] = set()
        self._now = 0.0
        self._tie = itertools.count()
        self._timers: list[tuple[float, int, Callable[[Connection], None]]] = []
        self._replies: deque[Callable[[Connection], None]] = deque()
        self._captured: list[Any] = []
        self._tasks = _tasks(self.saga.definition)
        self._calls: list[str] = []
        self._given: list[Any] = []

    # ── the scenario ────────────────────────────────────────────────────────────────────────

    def returns(self, step: str, result: Any) -> None:
        """Set the result of *step*: a value, or a function of its arguments."""
        self.results[step] = result

    def fails(self, step: str, error: Exception | None = None, *, times: int = 1) -> None:
        """Let *step*, or ``undo <step>``, fail *times* times before it succeeds."""
        self._failures[step].extend([error or RuntimeError(f"{step} fails")] * times)

    def is_late(self, step: str) -> None:
        """Delay the outcome of *step* until nothing else is left to happen."""
        self._late.add(step)

    def finds_locked(self, key: str, *, seconds: float) -> None:
        """Let another saga hold the lock of *key* for *seconds*."""
        acquire = self._sagas.engine.locks.acquire
        self._do(lambda connection: acquire(connection, key, OTHER, saga=OTHER, record=0))
        self._at(seconds, lambda connection: self._sagas.engine.release(connection, OTHER))

    def signals(self, name: str, value: Any = None, *, after: float = 0.0) -> None:
        """Send a signal *after* some seconds; ignored if the saga does not accept it then."""

        def signal(connection: Connection) -> None:
            with suppress(SagaError):
                self._sagas.signal(connection, ID, name, value, "test")

        self._at(after, signal)

    def cancels(self, *, after: float = 0.0) -> None:
        """Cancel the saga *after* some seconds; ignored if that is impossible then."""

        def cancel(connection: Connection) -> None:
            with suppress(SagaError):
                self._sagas.cancel(connection, ID, "test")

        self._at(after, cancel)

    def resumes(self) -> None:
        """Resume the parked saga: all failed parts are retried."""
        self._do(lambda connection: self._sagas.resume(connection, ID, "test"))

    def skips(self, path: str) -> None:
        """Count the failed part at *path* of the parked saga as done."""
        self._do(lambda connection: self._sagas.skip(connection, ID, "test", path))

    # ── running ─────────────────────────────────────────────────────────────────────────────

    def run(self, data: Mapping[str, Any] | None = None) -> End:
        """Start the saga, if *data* are given, and run it until nothing more happens.

        Raises:
            AssertionError: the saga is still advancing after 10 000 transitions.
        """
        if data is not None:
            begin = self._sagas.begin
            self._do(lambda connection: begin(connection, self.saga.definition, ID, data))
        for _ in range(MOST):
            if self._replies:
                self._do(self._replies.popleft())
            elif self._timers:
                self._now, _, act = heapq.heappop(self._timers)
                self._do(act)
            else:
                return self._end()
        raise AssertionError(f"the saga has not come to an end after {MOST} transitions")

    def _end(self) -> End:
        with self._engine.connect() as connection:
            saga = self._sagas.store.find(connection, ID)
            history = self._sagas.store.history(connection, ID)
        return End(
            state=saga.state.value,
            data=saga.data,
            calls=self._calls,
            given=self._given,
            error=saga.error,
            seconds=self._now,
            history=history,
        )

    def _do(self, act: Callable[[Connection], Any]) -> None:
        """Run one transition; its messages are sent if it commits."""
        repetitions = (False, True, True) if self.crashing else (True,)
        for committed in repetitions:
            self._captured = []
            with self._engine.connect() as connection:
                try:
                    act(connection)
                except Exception:
                    if committed and not self.crashing:
                        raise
                    connection.rollback()
                    continue
                if not committed:
                    connection.rollback()
                    continue
                connection.commit()
            for publish in self._captured:
                publish()

    def send_command(
        self, task: str, args: Sequence[Any], kwargs: Mapping[str, Any], **options: Any
    ) -> UUID:
        """Simulate a command. The engine calls it."""
        request = uuid4()
        step = self._tasks[task]
        self._captured.append(
            lambda: self._call(step, args[0] if args else kwargs, request, options)
        )
        return request

    def send_wakeup(
        self, wakeup: Wakeup, saga: str, record: int, *, countdown: float = 0, **options: Any
    ) -> None:
        """Simulate a wake-up. The engine calls it."""

        def wake(connection: Connection) -> None:
            self._sagas.wake(connection, wakeup.value, saga, record)

        def send() -> None:
            if countdown:
                self._at(countdown, wake)
            else:
                self._replies.append(wake)

        self._captured.append(send)

    def _at(self, seconds: float, act: Callable[[Connection], None]) -> None:
        heapq.heappush(self._timers, (self._now + seconds, next(self._tie), act))

    def _call(self, step: str, given: Any, request: UUID, options: Mapping[str, Any]) -> None:
        """Stand in for the worker that handles a command."""
        delay = options.get("countdown", 0.0)

        def reply(connection: Connection) -> None:
            self._sagas.receive_reply(connection, request, outcome)

        self._calls.append(step)
        self._given.append(given)
        failure = self._failures[step].popleft() if self._failures[step] else None
        if failure is not None:
            outcome: dict[str, Any] = {"error": self._errors.to_wire(failure)}
        else:
            result = self.results.get(step)
            outcome = {"result": result(given) if callable(result) else result}
        if step in self._late:
            self._at(1e9, reply)
        elif delay:
            self._at(delay, reply)
        else:
            self._replies.append(reply)


def _with_parts(definition: Definition) -> Iterator[Definition]:
    """A definition and the definitions of its sub-sagas, at any depth."""
    yield definition
    for part in definition.parts.values():
        if isinstance(part, SubSaga):
            yield from _with_parts(part.definition)


def _tasks(definition: Definition, prefix: str = "") -> dict[str, str]:
    """The step that calls each task, by task; a step of a sub-saga is named ``sub-saga/step``.

    Raises:
        SagaError: two steps call the same task.
    """
    found: dict[str, str] = {}
    for name, part in definition.parts.items():
        step = f"{prefix}{name}"
        if isinstance(part, SubSaga):
            calls = _tasks(part.definition, f"{step}/")
        elif isinstance(part, Step):
            calls = {part.task: step, **({part.undo: f"undo {step}"} if part.undo else {})}
        else:
            continue
        for task, call in calls.items():
            if task in found:
                raise SagaError(
                    f"{found[task]} and {call} are both calls of {task}, so that this test cannot "
                    "tell them apart. Give each step a task of its own."
                )
            found[task] = call
    return found
