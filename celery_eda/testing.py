"""A saga in memory, for tests of yours: no broker, no worker, and a clock that you do not wait for.

    test = SagaTest(order)
    test.fails("make", OutOfStock())
    end = test.run({"order": 7})
    assert end.state == "compensated"
    assert end.calls == ["pay", "make", "undo pay"]

It is the engine itself, on a SQLite database in memory. What it decides is the same each time.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, StaticPool, create_engine

from celery_eda.dialects import dialect_of
from celery_eda.errors import SagaError
from celery_eda.remote_errors import RemoteErrors
from celery_eda.saga import Saga
from celery_eda.saga_definition import Definition, Definitions, Step, SubSaga
from celery_eda.saga_engine import SagaEngine
from celery_eda.saga_locks import SagaLocks
from celery_eda.saga_log import Entry, SagaLog
from celery_eda.sagas import Sagas
from celery_eda.tables import Tables

#: Transitions after which a run is given up.
MOST = 10_000
ID, OTHER = "test", "another"


@dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
        state: of the saga; ``running`` if it waits for what never comes.
        calls: the steps in the order in which they were called, ``undo …`` for what undid one.
        given: with what each was called: arguments, or the one that it has.
        seconds: that have passed on the test's clock.
    """

    state: str
    data: Mapping[str, Any]
    calls: list[str]
    given: list[Any]
    error: str | None
    seconds: float
    history: list[Entry]


@dataclass
class SagaTest:
    """One run of one saga.

    Attributes:
        crashing: whether each transition is first done in vain, as by a worker that dies before
            its commit, and then done again, and each message comes twice.
    """

    saga: Saga
    crashing: bool = False
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        engine = create_engine("sqlite://", poolclass=StaticPool)
        dialect, tables = dialect_of(engine.url, claim_timeout=60), Tables.on()
        dialect.prepare(engine, 60)
        for table in (tables.sagas, tables.saga_steps, tables.saga_locks):
            table.create(engine)
        errors = RemoteErrors()
        definitions = Definitions()
        for each in _with_parts(self.saga.definition):
            definitions.add(each)
        log = SagaLog(tables.sagas, tables.saga_steps, dialect, errors.from_wire)
        app: Any = SimpleNamespace(send_task=self._tell_later)
        self._engine, self._errors = engine, errors
        locks = SagaLocks(tables.saga_locks, dialect)
        moves = SagaEngine(app, definitions, log, locks, self._ask, lambda: "")
        self._sagas = Sagas(moves, errors)
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

    # ── what is to happen ───────────────────────────────────────────────────────────────────

    def returns(self, step: str, result: Any) -> None:
        """Let *step* have this result, or what a function of its arguments says."""
        self.results[step] = result

    def fails(self, step: str, error: Exception | None = None, *, times: int = 1) -> None:
        """Let *step*, or ``undo <step>``, fail so often before it is done."""
        self._failures[step].extend([error or RuntimeError(f"{step} fails")] * times)

    def is_late(self, step: str) -> None:
        """Let the outcome of *step* come only when nothing else is left to happen."""
        self._late.add(step)

    def finds_locked(self, key: str, *, seconds: float) -> None:
        """Let another saga have the lock of *key*, for so long."""
        take = self._sagas.engine.locks.take
        self._do(lambda connection: take(connection, key, OTHER, saga=OTHER, record=0))
        self._at(seconds, lambda connection: self._sagas.engine.release(connection, OTHER))

    def signals(self, name: str, value: Any = None, *, after: float = 0.0) -> None:
        """Give a signal after so many seconds, if the saga can be given it then."""

        def signal(connection: Connection) -> None:
            with suppress(SagaError):
                self._sagas.signal(connection, ID, name, value, "test")

        self._at(after, signal)

    def cancels(self, *, after: float = 0.0) -> None:
        """Cancel the saga after so many seconds, if it can be then."""

        def cancel(connection: Connection) -> None:
            with suppress(SagaError):
                self._sagas.cancel(connection, ID, "test")

        self._at(after, cancel)

    def resumes(self) -> None:
        """Resume a saga that is parked."""
        self._do(lambda connection: self._sagas.resume(connection, ID, "test"))

    def skips(self, path: str) -> None:
        """Skip what failed in a saga that is parked."""
        self._do(lambda connection: self._sagas.skip(connection, ID, "test", path))

    # ── running ─────────────────────────────────────────────────────────────────────────────

    def run(self, data: Mapping[str, Any] | None = None) -> End:
        """Begin the saga, if *data* are given, and go on until nothing happens any more."""
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
            saga = self._sagas.log.find(connection, ID)
            history = self._sagas.log.history(connection, ID)
        return End(
            *(saga.state.value, saga.data, self._calls, self._given, saga.error),
            *(self._now, history),
        )

    def _do(self, act: Callable[[Connection], Any]) -> None:
        """One transition; what it published happens if it is committed."""
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

    def _ask(self, task: str, args: Any, kwargs: Any, **options: Any) -> Any:
        """Stands where a request is published."""
        request = uuid4()
        step = self._tasks[task]
        self._captured.append(
            lambda: self._call(step, args[0] if args else kwargs, request, options)
        )
        return SimpleNamespace(correlation_id=str(request))

    def _tell_later(self, _: str, args: Any, *, countdown: float = 0, **options: Any) -> None:
        """Stands where a saga's news are published."""

        def tell(connection: Connection) -> None:
            self._sagas.tell(connection, *args)

        self._captured.append(
            lambda: self._at(countdown, tell) if countdown else self._replies.append(tell)
        )

    def _at(self, seconds: float, act: Callable[[Connection], None]) -> None:
        heapq.heappush(self._timers, (self._now + seconds, next(self._tie), act))

    def _call(self, step: str, given: Any, request: UUID, options: Mapping[str, Any]) -> None:
        """What a worker does with the command."""
        delay = options.get("countdown", 0.0)

        def reply(connection: Connection) -> None:
            self._sagas.hear(connection, request, outcome)

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
    """A definition, and those of its sub-sagas."""
    yield definition
    for part in definition.parts.values():
        if isinstance(part, SubSaga):
            yield from _with_parts(part.definition)


def _tasks(definition: Definition, prefix: str = "") -> dict[str, str]:
    """The step that calls each task; those of sub-sagas as ``name/step``.

    Raises:
        SagaError: a task belongs to two, which could not be told apart.
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
                    f"{found[task]} and {call} are both calls of {task}, so that this test could "
                    "not tell them apart. Name a task of its own for each."
                )
            found[task] = call
    return found
