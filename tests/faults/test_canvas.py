"""The whole canvas through the outbox: every step takes effect once, whoever is killed meanwhile.

What it comes to is compared with a plain Celery app that runs the same canvas undisturbed.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from tests.faults.conftest import PATIENCE, ROADS, Road, expect_hits
from tests.faults.programs.process_nursery import Born
from tests.faults.programs.tables import effects
from tests.support.servers.redis import Redis

#: Canvas that run side by side, so that a test takes no longer than it must.
COURSES = {
    "tasks, chains and failures": [
        *("chain", "links", "group", "starmap", "chunks"),
        *("replaced", "replaced by a chain", "replaced by a chord"),
        *("errbacks", "failing chain", "failing chord"),
    ],
    "chords": [
        *("chord", "chord with retry", "chord of groups", "chord with a chain"),
        *("chord with a group", "chain of chords", "stamps"),
    ],
}
KILLS = 8
#: Steps of a worker after the commit, to complete a chord; see ``programs/canvas_system.py``.
STEPS = {
    "after store_result": "chord",
    "after _chord_publish_claim_expires": "chord",  # which is claimed now
    "after _retry_publish": "chord",  # whose body is published now
    "before fail_from_current_stack": "failing chord",  # whose errbacks are published now
    # Whichever part is the last one: it failed, and a copy of it has to say so again.
    "before chord_error_from_stack": "chord of failures",
}


#: Publishes a chord that has the same ids each time.
FROZEN = """
from tests.faults.programs.canvas_system import *
parts = [add.s(21, number).set(task_id=f"part {{number}}") for number in (1, 2)]
frozen = chord(group(parts, task_id="parts"), total.s())
frozen.freeze()
with {}():
    frozen.apply_async(task_id="body")
"""


@dataclass(frozen=True)
class Run:
    """What the canvas came to: the results by name, and the effects."""

    results: dict[str, Any]
    effects: Counter[tuple[str, int]]


EXPECTED = {
    "chord": Run(
        {"chord": 22},
        Counter([("add", 4000), ("add", 4001), ("add", 4002), ("add", 4003), ("total", 22)]),
    ),
    "failing chord": Run(
        {"failing chord": "ChordError(\"Dependency … raised ValueError('no 15')\")"},
        Counter([("add", 15001), ("mourn", 1)]),
    ),
    "chord of failures": Run(
        {"chord of failures": "ChordError(\"Dependency … raised ValueError('no 20')\")"},
        Counter([("mourn", 1)]),
    ),
}


def effects_of(road: Road) -> Counter[tuple[str, int]]:
    with road.engine.connect() as connection:
        rows = connection.execute(select(effects.c.name, effects.c.number)).all()
    return Counter((row.name, row.number) for row in rows)


def requester(road: Road, names: list[str]) -> Born:
    """A process that publishes canvas, waits for the results, and prints them."""
    results, errors = road.folder / "results", road.folder / "errors"
    return Born(
        ["-m", "tests.faults.programs.canvas_system", *names], road.environment, results, errors
    )


def supervise(road: Road, condition: Callable[[], Any], what: str) -> None:
    """Start every process again that dies, until *condition* is true."""

    def revive_and_see() -> Any:
        for process in road.processes:
            if not process.alive:
                process.start()
        return condition()

    road.until(revive_and_see, what, patience=240)


def results_of(road: Road, waiting: Born) -> dict[str, Any]:
    """What the requester printed in the end."""
    supervise(road, lambda: waiting.poll() is not None, "all results")
    assert waiting.returncode == 0, (road.folder / "errors").read_text() + road.logs()
    results: dict[str, Any] = json.loads((road.folder / "results").read_text())
    return results


@pytest.fixture(scope="module", params=COURSES)
def course(request: pytest.FixtureRequest) -> list[str]:
    return COURSES[request.param]


@pytest.fixture(scope="module")
def undisturbed(
    course: list[str], redis_server: Redis, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """The run of a plain Celery app."""
    folder = tmp_path_factory.mktemp("plain")
    road = canvas_road(redis_server.database(200), f"sqlite:///{folder}/plain.db", folder)
    road.environment.update(ROAD_PLAIN="1", ROAD_RESULTS=redis_server.database(201))
    road.worker(pool="threads")
    results = results_of(road, requester(road, course))
    road.end()
    return Run(results, effects_of(road))


@pytest.fixture(params=["rabbitmq-postgresql", "redis-mariadb"])
def road(request: pytest.FixtureRequest, redis_server: Redis, tmp_path: Path) -> Iterator[Road]:
    yield from reliable_road(request, request.param, redis_server, tmp_path)


@pytest.fixture
def rabbitmq_road(
    request: pytest.FixtureRequest, redis_server: Redis, tmp_path: Path
) -> Iterator[Road]:
    yield from reliable_road(request, "rabbitmq-postgresql", redis_server, tmp_path)


def reliable_road(
    request: pytest.FixtureRequest, name: str, results: Redis, folder: Path
) -> Iterator[Road]:
    broker, database = (request.getfixturevalue(each) for each in ROADS[name])
    road = canvas_road(broker, database, folder)
    road.environment.update(
        ROAD_RESULTS=results.database(202), ROAD_SETTINGS=json.dumps({"eda_max_deliveries": 50})
    )
    yield road
    road.end()


def canvas_road(broker: str, database: str, folder: Path) -> Road:
    road = Road(broker, database, folder)
    road.app = "tests.faults.programs.canvas_system"
    return road


def disturbed(road: Road, course: list[str], chaos: str, *, least: int) -> Run:
    """The run of the reliable app, whose processes kill themselves: see ``canvas.Chaos``.

    Nobody waits for the result of a link or an errback: they are waited for until there are at
    *least* so many effects.
    """
    road.worker(ROAD_CHAOS=chaos)
    road.relay(ROAD_CHAOS=chaos)
    results = results_of(road, requester(road, course))
    supervise(
        road,
        lambda: road.waiting() == 0 and effects_of(road).total() >= least,
        f"an empty outbox and {least} effects",
    )
    # Redis brings the messages of a lost worker after 2 s.
    calm = time.monotonic() + (4.0 if road.broker.startswith("redis") else 2.0)
    supervise(road, lambda: time.monotonic() > calm, "that no copy comes any more")
    expect_hits(len(list(road.folder.glob("kill*"))), "processes killed")
    return Run(results, effects_of(road))


def test_the_canvas_comes_to_the_same_whoever_is_killed(
    road: Road, course: list[str], undisturbed: Run
) -> None:
    run = disturbed(road, course, f"1,0.03,{KILLS}", least=undisturbed.effects.total())

    assert run == undisturbed


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(20))
def test_the_canvas_comes_to_the_same_however_many_are_killed(
    road: Road, course: list[str], undisturbed: Run, seed: int
) -> None:
    run = disturbed(road, course, f"{seed},0.1,{5 * KILLS}", least=undisturbed.effects.total())

    assert run == undisturbed


@pytest.mark.parametrize("step", STEPS)
def test_a_chord_comes_to_the_same_whatever_its_worker_had_done_when_killed(
    rabbitmq_road: Road, step: str
) -> None:
    name = STEPS[step]
    expected = EXPECTED[name]
    run = disturbed(rabbitmq_road, [name], f"0,1,1,{step}", least=expected.effects.total())

    assert run == expected


@pytest.mark.parametrize("where", ["transaction", "nullcontext"])
def test_a_frozen_chord_applied_again_is_a_run_of_its_own(road: Road, where: str) -> None:
    road.worker(pool="threads")
    road.relay()
    for times in range(1, 4):
        publisher = Born(["-c", FROZEN.format(where)], road.environment, road.folder / "errors")
        assert publisher.wait(PATIENCE) == 0, (road.folder / "errors").read_text()
        road.until(lambda times=times: road.effects("total").total() == times, "the body")
        road.settle()
    applied = effects_of(road)

    assert applied == {("add", 21001): 3, ("add", 21002): 3, ("total", 45): 3}


# ── each guard is needed ────────────────────────────────────────────────────────────────────


def effects_without(
    road: Road, mutation: str, name: str, step: str = "", *, least: int
) -> Counter[tuple[str, int]]:
    """The effects of a canvas with a guard removed, after everything that could come has come."""
    chaos = f"0,1,1,{step}" if step else ""
    road.worker(ROAD_CHAOS=chaos, ROAD_MUTATION=mutation)
    road.relay()
    waiting = requester(road, [name])
    road.until(lambda: effects_of(road).total() >= least, "the first effects")
    if step:
        road.until((road.folder / "kill0").exists, f"a worker at {step}")
    road.settle(8.0)  # a pool notices a lost child within six seconds
    waiting.kill()
    waiting.wait()
    return effects_of(road)


def test_unless_celery_finds_nothing_to_publish_the_next_task_runs_twice(
    rabbitmq_road: Road,
) -> None:
    found = effects_without(rabbitmq_road, "links_published_by_celery_too", "links", least=5)

    assert found == {("add", 2002): 1, ("add", 4020): 2, ("keep", 2): 2}


def test_unless_a_retry_is_a_revision_of_its_own_it_is_lost(rabbitmq_road: Road) -> None:
    found = effects_without(rabbitmq_road, "retry_keeps_its_identity", "chain", least=1)

    assert found == {("add", 1001): 1}


def test_unless_a_chords_body_has_an_identity_of_its_own_it_runs_twice(
    rabbitmq_road: Road,
) -> None:
    found = effects_without(
        rabbitmq_road, "chord_without_identity", "chord", "after _retry_publish", least=5
    )

    assert found[("total", 22)] == 2


@pytest.mark.parametrize(
    ("mutation", "name", "step", "missing"),
    [
        (
            "dead_worker_keeps_its_claim_on_a_chord",
            "chord",
            "after _chord_publish_claim_expires",
            ("total", 22),
        ),
        ("result_stands_for_the_whole_message", "chord", "after store_result", ("total", 22)),
        (
            "failure_is_told_once",
            "chord of failures",
            "before chord_error_from_stack",
            ("mourn", 1),
        ),
    ],
)
def test_without_a_guard_a_killed_worker_leaves_a_chord_incomplete_for_ever(
    rabbitmq_road: Road, mutation: str, name: str, step: str, missing: tuple[str, int]
) -> None:
    found = effects_without(
        rabbitmq_road, mutation, name, step, least=EXPECTED[name].effects.total() - 1
    )

    assert found == EXPECTED[name].effects - Counter([missing])
