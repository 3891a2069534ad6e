"""What comes for a saga at the same moment, on each database: each counts once, in some order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, select
from sqlalchemy.exc import DBAPIError

from celery_eda.errors import SagaError
from celery_eda.requests.remote_errors import RemoteErrors
from celery_eda.sagas.coordinator import Coordinator
from celery_eda.sagas.definition import Definition, Definitions
from celery_eda.sagas.engine import SagaEngine
from celery_eda.sagas.locks import SagaLocks
from celery_eda.sagas.messages import Wakeup
from celery_eda.sagas.steps import Steps, defined
from celery_eda.sagas.store import SagaStore, State
from tests.support.databases import Database

TIMES = 10


class Bench:
    """Sagas on a database; what they would send is written down instead."""

    def __init__(self, database: Database, definition: Definition) -> None:
        self.database = database
        errors, definitions = RemoteErrors(), Definitions()
        definitions.add(definition)
        tables, dialect = database.tables, database.dialect
        self.definition = definition
        engine = SagaEngine(
            definitions=definitions,
            store=SagaStore(tables.sagas, tables.saga_steps, dialect, errors),
            locks=SagaLocks(tables.saga_locks, dialect),
            messages=self,
        )
        self.sagas = Coordinator(engine, errors)

    def send_command(self, *_: Any, **__: Any) -> UUID:
        """Send nothing: the test makes the reply."""
        return uuid4()

    def send_wakeup(self, *_: Any, **__: Any) -> None:
        """Send nothing: the test wakes the saga."""

    def do(self, act: Callable[[Connection], Any]) -> None:
        """As a message is handled: again, if the database says that it lost a race."""
        while True:
            try:
                with self.database.engine.begin() as connection:
                    act(connection)
                return
            except DBAPIError as error:
                if not self.database.dialect.is_transient(error):
                    raise

    def at_once(self, *acts: Callable[[Connection], Any]) -> None:
        """Do all of it at the same moment."""
        ready = threading.Barrier(len(acts))

        def together(act: Callable[[Connection], Any]) -> None:
            ready.wait(30)
            self.do(act)

        with ThreadPoolExecutor(len(acts)) as pool:
            for future in [pool.submit(together, act) for act in acts]:
                future.result()

    def state(self, id: str) -> State:
        with self.database.engine.connect() as connection:
            return self.sagas.store.find(connection, id).state

    def requests(self, id: str) -> dict[str, UUID]:
        """What a saga has asked for, by the place, and whether it was to undo."""
        columns = self.database.tables.saga_steps.c
        query = select(columns.kind, columns.place, columns.request).where(columns.saga == id)
        with self.database.engine.connect() as connection:
            return {
                f"{kind} {place}": request for kind, place, request in connection.execute(query)
            }


def beside(steps: Steps) -> None:
    with steps.parallel():
        for name in ("one", "other"):
            with steps.branch():
                steps.step(name, f"task.{name}", undo=f"task.undo_{name}")
    steps.step("last", "task.last")


def test_two_replies_in_the_same_moment_both_count_and_what_follows_is_asked_once(
    database: Database,
) -> None:
    bench = Bench(database, defined("saga", 1, beside))
    for number in range(TIMES):
        id = f"saga {number}"
        bench.do(lambda c, id=id: bench.sagas.begin(c, bench.definition, id, {}))
        one, other = (bench.requests(id)[f"step {name}"] for name in ("one", "other"))

        bench.at_once(
            lambda c, one=one: bench.sagas.receive_reply(c, one, {"result": 1}),
            lambda c, other=other: bench.sagas.receive_reply(c, other, {"result": 2}),
            lambda c, other=other: bench.sagas.receive_reply(
                c, other, {"result": 2}
            ),  # it comes twice
        )

        assert list(bench.requests(id)) == ["step one", "step other", "step last"]
        last = bench.requests(id)["step last"]
        bench.do(lambda c, last=last: bench.sagas.receive_reply(c, last, {"result": 3}))
        assert bench.state(id) is State.completed


def hurried(steps: Steps) -> None:
    steps.step("one", "task.one", undo="task.undo_one", timeout=60)


@pytest.mark.parametrize("first", ["the time", "the reply", "a person"])
def test_a_time_out_a_reply_and_a_person_who_cancels_may_come_at_once(
    database: Database, first: str
) -> None:
    """Whoever is first, the step is undone if it is not kept; the order of the calls is mixed."""
    bench = Bench(database, defined("saga", 1, hurried))
    ends = set()
    for number in range(TIMES):
        id = f"saga {number}"
        bench.do(lambda c, id=id: bench.sagas.begin(c, bench.definition, id, {}))
        request = bench.requests(id)["step one"]
        with database.engine.connect() as connection:
            record = bench.sagas.store.records(connection, id)[0].id
        acts = {
            "the time": lambda c: bench.sagas.wake(c, Wakeup.timer.value, id, record),  # noqa: B023
            "the reply": lambda c: bench.sagas.receive_reply(c, request, {"result": 1}),  # noqa: B023
            "a person": lambda c: _cancelled(bench, c, id),  # noqa: B023
        }

        bench.at_once(acts.pop(first), *acts.values())

        while bench.state(id) is State.compensating:
            undo = bench.requests(id)["undo one"]
            bench.do(lambda c, undo=undo: bench.sagas.receive_reply(c, undo, {"result": None}))
        ends.add(bench.state(id))
        undone = "undo one" in bench.requests(id)
        assert undone == (bench.state(id) is not State.completed)

    assert ends <= {State.completed, State.compensated, State.cancelled}


def _cancelled(bench: Bench, connection: Connection, id: str) -> None:
    with suppress(SagaError):  # it may be over
        bench.sagas.cancel(connection, id, "a person")
