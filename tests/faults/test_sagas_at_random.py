"""Sagas that go wrong at random, while those that move them on are killed at every transition."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import exists, func, insert, select

from tests.faults import conftest
from tests.faults.conftest import Road, expect_hits
from tests.faults.programs.tables import accounts, effects

ACCOUNTS, OPENING = 8, 1000
#: What is undone by what.
UNDONE_BY = {
    "take": "give back",
    "give": "take back",
    "hurry": "slow down",
    "book north": "leave north",
    "book south": "leave south",
    "write": "tear up",
    "file": "take out",
}
#: At which transitions a process has to have been killed: those that every run has.
TRANSITIONS = [
    *("step.take.done", "step.take.failed", "step.give.done", "step.give.failed"),
    *("step.hurry.done", "step.hurry.failed", "step.ask.done", "step.end.done"),
    *("step.end.failed", "step.report.done", "step.write.done", "step.file.done"),
    *("undo.take.done", "undo.take.failed", "undo.give.done", "undo.report.done"),
    *("wait.approved.done", "wait.round[1].done", "step.count[1].done"),
    *("step.north.done", "step.south.done"),
]


@pytest.fixture(autouse=True)
def bank(road: Road) -> None:
    road.app = "tests.faults.programs.random_bank"
    road.environment["ROAD_MAX_DELIVERIES"] = "1000"  # a message may be hit again and again
    with road.engine.begin() as connection:
        opening = [{"id": n, "visits": OPENING * (n > 0)} for n in range(ACCOUNTS + 1)]
        connection.execute(insert(accounts), opening)


def states(road: Road) -> dict[int, str]:
    """The state of each transfer by its number."""
    columns = road.tables.sagas.c
    query = select(columns.id, columns.state).where(columns.name == "transfer")
    with road.engine.connect() as connection:
        return {int(id_.split()[1]): state for id_, state in connection.execute(query)}


def under_way(road: Road) -> int:
    """Transfers that go on by themselves: not those that wait for what a parked one has locked."""
    sagas, steps = road.tables.sagas.c, road.tables.saga_steps.c
    waits = exists().where(steps.saga == sagas.id, steps.kind == "lock", steps.status == "open")
    on_their_way = sagas.state.in_(["running", "compensating"])
    return int(road._all(select(func.count()).where(on_their_way, ~waits))[0])


def counts(road: Road) -> dict[int, Counter[str]]:
    """How often what took effect for each transfer."""
    found: dict[int, Counter[str]] = defaultdict(Counter)
    with road.engine.connect() as connection:
        for number, name in connection.execute(select(effects.c.number, effects.c.name)):
            found[number][name] += 1
    return found


@contextmanager
def watched(road: Road) -> Iterator[list[int]]:
    """Gives all sums of money that were seen meanwhile."""
    sums, over = [], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            with road.engine.connect() as connection:
                sums.append(int(connection.scalar(select(func.sum(accounts.c.visits))) or 0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield sums
    finally:
        over.set()
        watcher.join()


def expect_that_it_all_fits(road: Road) -> None:
    """Each transfer was made or undone, each of its effects once, and no money is on its way."""
    ends, found = states(road), counts(road)
    for number, state in ends.items():
        did = found[number]
        assert max([*(did[each] for each in did if each != "count"), 1]) == 1, (number, did)
        for name, undo in UNDONE_BY.items():
            left = did[name] - did[undo]
            assert left in ((0,) if state == "compensated" else (0, 1)), (number, state, did)
        assert (did["end"] == 1) == (state == "completed"), (number, state, did)
        if state == "completed":
            assert did["take"] - did["give back"] == did["give"] - did["take back"] == 1
            booked = sum(did[f"book {who}"] - did[f"leave {who}"] for who in ("north", "south"))
            assert booked == (1 if did["book north"] else 0), (number, did)
    moved = Counter(ends.values())["completed"]
    with road.engine.connect() as connection:
        money = dict(connection.execute(select(accounts.c.id, accounts.c.visits)).all())  # type: ignore[arg-type]
    assert sum(money.values()) == ACCOUNTS * OPENING
    assert money[0] == 0
    assert moved == sum(did["give"] - did["take back"] for did in found.values())


@conftest.first_of("rabbitmq-postgresql", "redis-mariadb", "eda-sqlite")
@pytest.mark.parametrize("transfers", [200, pytest.param(1000, marks=pytest.mark.soak)])
@pytest.mark.timeout(900)
def test_every_saga_ends_honestly_whoever_dies_at_whichever_transition(
    road: Road, transfers: int
) -> None:
    for name in ("one", "two"):
        road.worker("-n", f"{name}@%h", ROAD_KILLS="1")
    relay = road.relay()

    with watched(road) as sums:
        half = transfers // 2
        begun = [
            road._run(
                ["tests.faults.programs.random_bank", str(first), str(first + half - 1)], None
            )
            for first in (1, half + 1)
        ]
        assert [each.wait() for each in begun] == [0, 0], road.logs()
        relay.kill()
        relay.start()

        road.until(lambda: not under_way(road), "ends", patience=conftest.PATIENCE * 5)
        parked = [number for number, state in states(road).items() if state == "parked"]
        Path(road.folder, "healed").touch()
        road.run(
            "from tests.faults.programs.random_bank import transfer\n"
            "from celery_eda.sagas.store import State\n"
            "with eda.databases.engine.connect() as connection:\n"
            "    parked = eda.sagas.store.select(connection, State.parked, None, 10_000)\n"
            "for each in parked:\n"
            "    with eda.transaction() as session:\n"
            "        eda.sagas.coordinator.resume(session.connection(), each.id, 'a person')\n"
        )
        road.until(
            lambda: set(states(road).values()) <= {"completed", "compensated"},
            "an end of those that were resumed",
        )
        road.settle(3.0 if road.broker.startswith("redis") else 1.5)

    ends = Counter(states(road).values())
    expect_that_it_all_fits(road)
    assert set(sums) == {ACCOUNTS * OPENING}
    assert sum(ends.values()) == transfers
    assert road.dead() == []
    killed = {path.name for path in Path(road.folder).glob("killed *")}
    for transition in TRANSITIONS:
        for when in ("before", "in", "after"):
            assert f"killed {when} {transition}" in killed, sorted(killed)
    expect_hits(len(killed), "processes killed in the middle of a transition")
    expect_hits(len(parked), "sagas that had to be resumed")
    expect_hits(ends["compensated"], "sagas undone")
    expect_hits(ends["completed"], "sagas completed")
