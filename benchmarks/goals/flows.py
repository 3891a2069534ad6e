"""S13: the cost of a step of a business flow: chain, events or saga; and by stored sagas."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Engine, create_engine, delete, func, select, text

from benchmarks import figures
from benchmarks.contestant import Contestant
from benchmarks.pairing import interleaved
from benchmarks.result import Check, Result
from benchmarks.stage import Cast, Stage, Worker, until
from tests.faults.programs.tables import effects

ROUNDS = 5
STEPS = 5
#: Flows of one run that are begun together, and those begun one after the other.
TOGETHER, ALONE = 60, 10
#: Sagas of five steps in the big database at scale 1.
STORED = 100_000
TARGET = 1.2

_numbers = itertools.count(1, 1_000_000)


@dataclass(frozen=True)
class Flow:
    """One implementation of the flows: its publisher, its workers and its database."""

    verb: str
    contestant: Contestant
    worker: Worker
    engine: Engine

    def run(self, count: int) -> tuple[float, float]:
        """Begin *count* flows and wait for their last rows; returns seconds and CPU seconds."""
        busy, begun = self.worker.cpu(), time.perf_counter()
        told = self.contestant.do(self.verb, count, next(_numbers))
        until(lambda: self._rows() >= count * STEPS, f"{count} flows by {self.verb}")
        took = time.perf_counter() - begun
        if self.verb == "sagas":
            until(self._ended, "the end of all sagas")
            took = time.perf_counter() - begun
        with self.engine.begin() as connection:
            rows = connection.execute(delete(effects)).rowcount
        if rows != count * STEPS:
            raise RuntimeError(f"{rows} rows of {count} flows by {self.verb}")
        return took, self.worker.cpu() - busy + told.cpu

    def one_by_one(self, count: int) -> float:
        """The median of the seconds of *count* flows that run one after the other."""
        return figures.median([self.run(1)[0] for _ in range(count)])

    def _rows(self) -> int:
        with self.engine.connect() as connection:
            return int(connection.scalar(select(func.count()).select_from(effects)) or 0)

    def _ended(self) -> bool:
        under_way = text("SELECT count(*) FROM eda_sagas WHERE state = 'running'")
        with self.engine.connect() as connection:
            return not connection.scalar(under_way)


def s13(stage: Stage, scale: float) -> Result:
    """The same five steps as a plain chain, a reliable chain, by events and as a saga."""
    with stage.cast() as cast:
        flows = {
            "plain chain": _flow(stage, cast, "plain", "chains"),
            "reliable chain": _flow(stage, cast, "flows", "chains"),
            "events": _flow(stage, cast, "flows", "events"),
            "saga": _flow(stage, cast, "flows", "sagas"),
        }
        runs = interleaved(
            {name: partial(flow.run, TOGETHER) for name, flow in flows.items()}, rounds=ROUNDS
        )
        alone = interleaved(
            {name: partial(flow.one_by_one, ALONE) for name, flow in flows.items()}, rounds=ROUNDS
        )
    stored = max(1, round(STORED * scale))
    check, grown = _growth(stage, stored)
    steps = TOGETHER * STEPS
    return Result(
        "S13",
        [check],
        runs=ROUNDS,
        medians={
            **{
                f"{name}, steps/s": figures.median([steps / took for took, _ in rounds])
                for name, rounds in runs.items()
            },
            **{
                f"{name}, alone, ms per step": 1000 * figures.median(rounds) / STEPS
                for name, rounds in alone.items()
            },
            **grown,
        },
        cpu={
            name: figures.median([1e6 * cpu / steps for _, cpu in rounds])
            for name, rounds in runs.items()
        },
        compared=(
            f"{TOGETHER} flows begun one after the other and {ALONE} begun when the one before was "
            f"over, of {STEPS} steps that insert a row each, on PostgreSQL and RabbitMQ, by a "
            f"worker of two processes; then {TOGETHER} sagas beside {stored} that are over."
        ),
        samples={name: [steps / took for took, _ in rounds] for name, rounds in runs.items()},
        unit="steps/s",
        scale=scale,
    )


def _growth(stage: Stage, stored: int) -> tuple[Check, dict[str, float]]:
    """Sagas in an empty database and in a big one, alternating."""
    with stage.cast() as cast:
        flows = {name: _flow(stage, cast, "flows", "sagas") for name in ("empty", "big")}
        flows["big"].run(1)
        fill(flows["big"].engine, stored)
        cases: dict[str, Callable[[], tuple[float, float]]] = {
            name: partial(flow.run, TOGETHER) for name, flow in flows.items()
        }
        runs = interleaved(cases, rounds=ROUNDS)
    took = {name: [seconds for seconds, _ in rounds] for name, rounds in runs.items()}
    why = f"measured with {stored} of {STORED} sagas: see --scale" if stored < STORED else None
    what = f"time of {TOGETHER} sagas: beside {stored} that are over ÷ beside few"
    check = Check.of(what, figures.ratios(took["big"], took["empty"]), at_most=TARGET, why=why)
    steps = TOGETHER * STEPS
    return check, {
        f"saga, {name} tables, steps/s": figures.median([steps / each for each in seconds])
        for name, seconds in took.items()
    }


def fill(engine: Engine, count: int) -> None:
    """Insert *count* copies of the only saga, with their steps."""
    with engine.begin() as connection:
        for table, key, named in (("eda_sagas", "id", "id"), ("eda_saga_steps", "saga", "saga")):
            columns = connection.execute(
                text(
                    "SELECT column_name FROM information_schema.columns WHERE table_name = :table "
                    "AND column_name NOT IN (:key, 'id', 'request')"
                ),
                {"table": table, "key": key},
            )
            names = ", ".join(f'"{name}"' for name in columns.scalars())
            connection.execute(
                text(
                    f"INSERT INTO {table} ({named}, {names}) SELECT 'old' || n, {names} "
                    f"FROM {table}, generate_series(1, :count) AS n"
                ),
                {"count": count},
            )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM (ANALYZE) eda_sagas, eda_saga_steps"))
        connection.execute(text("CHECKPOINT"))


def _flow(stage: Stage, cast: Cast, module: str, verb: str) -> Flow:
    places = {
        "BENCH_DATABASE": stage.database(),
        "BENCH_BROKER": stage.broker("rabbitmq"),
        "BENCH_QUEUE": "flows",
        "BENCH_LATE": "1",
    }
    contestant = cast.contestant(module, **places)
    if module == "flows":
        contestant.do("subscribe")
    worker = cast.worker(module, **places)
    return Flow(verb, contestant, worker, create_engine(places["BENCH_DATABASE"]))
