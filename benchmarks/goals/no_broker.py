"""S14: the database as Celery's broker, beside brokers, and beside other queues in databases."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sqlalchemy import create_engine, text

from benchmarks import figures
from benchmarks.contestant import Contestant
from benchmarks.marks import Marks
from benchmarks.pairing import interleaved
from benchmarks.result import Check, Result
from benchmarks.stage import Cast, Stage, Worker
from celery_eda.databases import upgrade
from celery_eda.databases.tables import Tables
from tests.faults.programs.tables import metadata

OURS, PEER = "eda+postgresql", "procrastinate"
ROUNDS = 3
#: Rounds of the measurements with and without an old transaction.
OLD_ROUNDS = 11
#: Messages published and handled in one round, and messages whose latency is measured.
MESSAGES, TAKEN_ONE_BY_ONE, LATE = 1_000, 300, 50
PAUSE = 0.02
#: Seconds within which a worker has to exit.
STOPPING = 20.0
#: Seconds for which idle workers are watched; takeovers of each kind.
IDLE, TAKEOVERS = 8.0, 4
#: Messages waiting in the full queue, at scale 1.
WAITING = 1_000_000
#: Messages that a worker of one slot prefetches.
PREFETCH = 4
#: Seconds within which another worker has to take over from a killed one.
TAKEOVER = 2.0
TARGET = 1.2

_numbers = itertools.count(1, 10_000)


@dataclass(frozen=True)
class Queue:
    """A kind of queue: its publisher, its worker, and its measure of latency."""

    publisher: Contestant
    work: Callable[[Cast], Worker]
    latency: str

    def published(self, stage: Stage, marks: Marks) -> tuple[float, float]:
        """Messages per second: published without a worker, then handled."""
        marks.forget()
        took = self.publisher.do("publish_starts", MESSAGES, 0).seconds
        with stage.cast() as cast:
            worker = self.work(cast)
            rate = marks.rate(MESSAGES)
            worker.host.stop(STOPPING)
        return MESSAGES / took, rate

    def latencies(self, marks: Marks) -> list[float]:
        """Seconds from before each commit to the start of its task."""
        marks.forget()
        moments = self.publisher.do(self.latency, LATE, PAUSE).value
        started = marks.of(LATE)
        return [started[number] - before for number, (before, _) in enumerate(moments)]


def s14(stage: Stage, scale: float) -> Result:
    """Throughput, latency, idle cost, an old transaction, a full queue, a killed worker."""
    waiting = max(2 * TAKEN_ONE_BY_ONE, round(WAITING * scale))
    with Marks(stage.folder) as marks, stage.cast() as cast:
        queues = _queues(stage, cast, marks)
        rates = _rates(stage, queues, marks, ROUNDS)
        beside, holding = _queues_beside_old(stage, cast, marks)
        with holding:
            ages = {name: _ages(stage, marks, queues[name], beside[name]) for name in (OURS, PEER)}
        workers = {name: queue.work(cast) for name, queue in queues.items()}
        late = interleaved(
            {name: partial(queue.latencies, marks) for name, queue in queues.items()},
            rounds=ROUNDS,
        )
        idle = _idle(workers)
    what = "worked off/s without an old transaction ÷ beside one"
    checks = [Check.of(f"{OURS}: {what}", ages[OURS], at_most=TARGET)]
    medians = {f"{PEER}: {what}": figures.median(ages[PEER])}
    for name, rounds in rates.items():
        medians[f"{name}: published/s"] = figures.median([one for one, _ in rounds])
        medians[f"{name}: worked off/s"] = figures.median([one for _, one in rounds])
        seconds = [each for one in late[name] for each in one]
        medians[f"{name}: commit → start, p50 ms"] = 1000 * figures.percentile(seconds, 0.5)
        medians[f"{name}: commit → start, p99 ms"] = 1000 * figures.percentile(seconds, 0.99)
        medians[f"{name}: idle, CPU ms per s"] = idle[name]
    for kind in ("eda+sqlite", OURS):
        check, grown = _growth(stage, kind, waiting)
        checks.append(check)
        medians.update(grown)
        seconds = _takeovers(stage, kind)
        what = f"{kind}: seconds until what a killed worker held starts elsewhere ÷ {TAKEOVER:g} s"
        checks.append(Check.of(what, [each / TAKEOVER for each in seconds], at_most=1.0))
        medians[f"{kind}: taken over, longest s"] = max(seconds)
    return Result(
        "S14",
        checks,
        runs=ROUNDS,
        medians=medians,
        compared=(
            f"{MESSAGES} messages published one by one, each with a commit of its own, while no "
            "worker is there, and then worked off by a new worker of two slots, from its first "
            "task to its last; the same beside an old snapshot and without one, by turns, in "
            f"{OLD_ROUNDS} rounds; "
            f"{LATE} messages {PAUSE * 1000:g} ms apart; an idle worker for {IDLE:g} s; "
            f"{TAKEN_ONE_BY_ONE} messages published and taken one by one, beside {waiting} that "
            f"wait; a worker killed {TAKEOVERS} times."
        ),
        samples={name: [one for _, one in rounds] for name, rounds in rates.items()},
        unit="worked off/s",
        scale=scale,
    )


def _rates(
    stage: Stage, queues: dict[str, Queue], marks: Marks, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    cases = {name: partial(queue.published, stage, marks) for name, queue in queues.items()}
    return interleaved(cases, rounds=rounds)


def _of_ours(cast: Cast, marks: Marks, places: dict[str, str]) -> Queue:
    where = {**places, "BENCH_MARKS": marks.path}
    publisher = cast.contestant("ours", **where)
    return Queue(publisher, lambda cast: cast.worker("ours", **where), "start_after_commit")


def _of_peer(cast: Cast, marks: Marks, database: str) -> Queue:
    where = {"BENCH_DATABASE": database, "BENCH_MARKS": marks.path}
    publisher = cast.contestant("procrastinate", **where)
    publisher.do("prepare")
    words = ("benchmarks.contestants.procrastinate", "work")
    return Queue(publisher, lambda cast: cast.program(*words, **where), "start_at_once")


def _queues(stage: Stage, cast: Cast, marks: Marks) -> dict[str, Queue]:
    def plain(broker: str) -> Queue:
        where = {"BENCH_BROKER": broker, "BENCH_MARKS": marks.path, "BENCH_LATE": "1"}
        publisher = cast.contestant("plain", **where)
        return Queue(publisher, lambda cast: cast.worker("plain", **where), "start_at_once")

    rabbitmq = {"BENCH_BROKER": stage.broker("rabbitmq"), "BENCH_DATABASE": stage.database()}
    return {
        "eda+sqlite": _of_ours(cast, marks, _places(stage, "eda+sqlite")),
        OURS: _of_ours(cast, marks, _places(stage, OURS)),
        "RabbitMQ, outbox and relay": _of_ours(cast, marks, rabbitmq),
        "Redis, plain": plain(stage.broker("redis")),
        "sqla+sqlite, plain": plain(f"sqla+sqlite:///{_file(stage)}"),
        PEER: _of_peer(cast, marks, stage.database()),
    }


def _file(stage: Stage) -> Path:
    return stage.folder / f"{next(_numbers)}.db"


def _places(stage: Stage, kind: str) -> dict[str, str]:
    """A database that is the broker and has the service's tables."""
    if kind == OURS:
        url = stage.database()
    else:
        url = f"sqlite:///{_file(stage)}"
        engine = create_engine(url)
        upgrade.upgrade(engine, Tables.on())
        metadata.create_all(engine)
        engine.dispose()
    return {"BENCH_BROKER": f"eda+{url}", "BENCH_DATABASE": url}


def _idle(workers: dict[str, Worker]) -> dict[str, float]:
    """Milliseconds of CPU per second of each idle worker."""
    begun, before = time.monotonic(), {name: each.cpu() for name, each in workers.items()}
    time.sleep(IDLE)
    took = time.monotonic() - begun
    return {name: 1000 * (each.cpu() - before[name]) / took for name, each in workers.items()}


def _queues_beside_old(
    stage: Stage, cast: Cast, marks: Marks
) -> tuple[dict[str, Queue], ExitStack]:
    """Two queues in databases of their own, each with a transaction that stays open."""
    places = _places(stage, OURS)
    peer = stage.database()
    queues = {OURS: _of_ours(cast, marks, places), PEER: _of_peer(cast, marks, peer)}
    stack = ExitStack()
    for url in (places["BENCH_DATABASE"], peer):
        engine = create_engine(url, isolation_level="REPEATABLE READ")
        stack.callback(engine.dispose)
        connection = stack.enter_context(engine.connect())
        connection.execute(text("SELECT count(*) FROM pg_class"))
    return queues, stack


def _ages(stage: Stage, marks: Marks, young: Queue, old: Queue) -> list[float]:
    """Ratios of the rates without and with an old transaction, measured alternately."""
    rates = _rates(stage, {"young": young, "old": old}, marks, OLD_ROUNDS)
    young_rates, old_rates = ([rate for _, rate in rates[name]] for name in ("young", "old"))
    return figures.ratios(young_rates, old_rates)


def _growth(stage: Stage, kind: str, waiting: int) -> tuple[Check, dict[str, float]]:
    """Consuming from a short queue and from a long one, alternating."""
    with stage.cast() as cast:
        queues: dict[str, Contestant] = {}
        for name in ("short", "long"):
            places = _places(stage, kind)
            queues[name] = cast.contestant("ours", **places)
            queues[name].do("publish_starts", 1, 0)
            if name == "long":
                fill(places["BENCH_DATABASE"], waiting)
        cases: dict[str, Callable[[], float]] = {
            name: partial(_taken, queue) for name, queue in queues.items()
        }
        took = interleaved(cases, rounds=ROUNDS)
    what = f"{kind}: {TAKEN_ONE_BY_ONE} published and taken, of {waiting} that wait ÷ of none"
    why = f"measured with {waiting} of {WAITING}: see --scale" if waiting < WAITING else None
    check = Check.of(what, figures.ratios(took["long"], took["short"]), at_most=TARGET, why=why)
    return check, {
        f"{kind}, {name} queue: ms per message": 1000 * figures.median(each) / TAKEN_ONE_BY_ONE
        for name, each in took.items()
    }


def _taken(queue: Contestant) -> float:
    """Seconds to append messages to the queue and to consume as many from its front."""
    put = queue.do("publish_starts", TAKEN_ONE_BY_ONE, next(_numbers)).seconds
    return put + queue.do("take_bare", TAKEN_ONE_BY_ONE).seconds


def fill(url: str, count: int) -> None:
    """Append *count* copies of the only message to the queue."""
    engine = create_engine(url)
    names = "queue, rank, message, body, at, fence"
    with engine.begin() as connection:
        connection.execute(
            text(
                f"INSERT INTO eda_queue ({names}) "
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count) "
                f"SELECT {names} FROM eda_queue, n WHERE eda_queue.id = "
                "(SELECT min(id) FROM eda_queue)"
            ),
            {"count": count},
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    engine.dispose()


def _takeovers(stage: Stage, kind: str) -> list[float]:
    """Seconds from a worker's SIGKILL until another worker starts its message."""
    found = []
    for _ in range(TAKEOVERS):
        with Marks(stage.folder) as marks, stage.cast() as cast:
            places = {**_places(stage, kind), "BENCH_MARKS": marks.path}
            publisher = cast.contestant("ours", **places)
            holder = cast.worker("ours", "-c1", **places)
            publisher.do("occupy", 0)
            marks.when(0)  # it has both by then: it prefetches four
            cast.worker("ours", **places)
            publisher.do("publish_starts", 2 * PREFETCH, 2)
            marks.when(2 + PREFETCH)  # by the other worker, which is free
            killed = time.monotonic()
            holder.host.kill()
            found.append(marks.when(1) - killed)
    return found
