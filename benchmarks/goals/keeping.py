"""S15: costs that grow with the number of keys or the life of a worker; housekeeping."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sqlalchemy import create_engine, text

from benchmarks import figures
from benchmarks.contestant import Contestant, Measured
from benchmarks.goals.consuming import consumed
from benchmarks.goals.growth import remember
from benchmarks.marks import Marks
from benchmarks.pairing import interleaved
from benchmarks.result import Check, Result
from benchmarks.stage import Stage, until

ROUNDS = 5
#: Keys of the big tables.
KEYS = 100_000
#: Messages of one round, each with a key of its own or all with one.
ORDERED = 150
#: Expired rows of the inbox, and messages handled during their deletion.
OLD, HANDLED = 400_000, 300
#: Messages that a worker handles between two readings of its memory, and readings.
CONSUMED, LOOKS = 600, 6
TARGET = 1.2
#: Settings of a relay that does housekeeping all the time, at full speed.
DILIGENT = '{"eda_housekeeping_interval": 0.1, "eda_relay_poll": 0.01}'
KEPT = '{"eda_send_after_commit": false}'


def s15(stage: Stage, scale: float) -> Result:
    """Order among few keys and among many; handlers beside the housekeeping; a worker's memory."""
    keys, old = max(1, round(KEYS * scale)), max(1000, round(OLD * scale))
    consumed_at_once = max(2, round(CONSUMED * scale))
    order, medians = _order(stage, keys)
    beside, purged = _beside_housekeeping(stage, old)
    memory = _memory(stage, consumed_at_once)
    return Result(
        "S15",
        [
            Check.of(
                f"{ORDERED} messages of {ORDERED} keys published and handled: among {keys} keys ÷ "
                "among few",
                figures.ratios(order["many"], order["few"]),
                at_most=TARGET,
            ),
            Check.of(
                "a handler beside a relay that deletes old rows all the time ÷ beside one that has "
                "none",
                figures.ratios(beside["old rows"], beside["none"]),
                at_most=TARGET,
            ),
            Check.of(
                f"memory of a worker after {consumed_at_once * LOOKS} messages ÷ after "
                f"{consumed_at_once}",
                [memory[-1] / memory[0]],
                at_most=TARGET,
            ),
        ],
        runs=ROUNDS,
        medians={
            **medians,
            **{f"handler beside {name}, µs": figures.median(us) for name, us in beside.items()},
            "old rows deleted beside, rows/s": purged,
            "memory of a worker of two processes, MB": memory[-1] / 2**20,
        },
        compared=(
            f"{ORDERED} messages published in one transaction and delivered without a broker, each "
            f"of a key of its own, with {keys} keys in the tables and with few; then all of one "
            f"key. {HANDLED} messages handled while a relay beside deletes {old} old rows of the "
            f"inbox, and while it has none. A worker of two processes that handles "
            f"{consumed_at_once} messages {LOOKS} times."
        ),
        samples=order,
        unit=f"ms for {ORDERED} messages",
        scale=scale,
    )


def _order(stage: Stage, keys: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of each round, and microseconds per message."""
    with stage.cast() as cast:
        services = {}
        for name in ("few", "many"):
            places = {"BENCH_DATABASE": stage.database(), "BENCH_BROKER": stage.broker("rabbitmq")}
            services[name] = cast.contestant("ours", **places, BENCH_SETTINGS=KEPT)
            if name == "many":
                know(places["BENCH_DATABASE"], keys)
        cases: dict[str, Callable[[], Measured]] = {
            name: partial(service.do, "keep_order", ORDERED, ORDERED)
            for name, service in services.items()
        }
        cases["one key"] = partial(services["many"].do, "keep_order", ORDERED, 1)
        took = interleaved(cases, rounds=ROUNDS)
    order = {name: [1000 * each.seconds for each in rounds] for name, rounds in took.items()}
    medians = {
        f"ordered, {name}, µs per message": 1000 * figures.median(each) / ORDERED
        for name, each in order.items()
    }
    return order, medians


def _beside_housekeeping(stage: Stage, old: int) -> tuple[dict[str, list[float]], float]:
    """Microseconds per handled message beside a relay that deletes rows and one that has none to
    delete, and deleted rows per second.
    """
    with stage.cast() as cast:
        cases: dict[str, Callable[[], float]] = {}
        relays: dict[str, Contestant] = {}
        deleted: list[float] = []
        for name in ("old rows", "none"):
            url = stage.database()
            places = {"BENCH_DATABASE": url, "BENCH_BROKER": stage.broker("rabbitmq")}
            service = cast.contestant("ours", **places, BENCH_SETTINGS=KEPT)
            relays[name] = cast.contestant("ours", **places, BENCH_SETTINGS=DILIGENT)
            if name == "old rows":
                remember(url, old, days=30)
            cases[name] = partial(_handled_beside, relays[name], service, url, deleted)
        took = interleaved(cases, rounds=ROUNDS)
    return took, figures.median([rate for rate in deleted if rate])


def _handled_beside(
    relay: Contestant, service: Contestant, url: str, deleted: list[float]
) -> float:
    """Microseconds per handled message while the relay runs; records deleted rows per second."""
    before = _old(url)
    relay.begin("relay_until_told")
    until(lambda: before == 0 or _old(url) < before, "the housekeeping has begun")
    before = _old(url)
    handled = service.do("handle", HANDLED)
    deleted.append((before - _old(url)) / handled.seconds)
    relay.tell()
    relay.end()
    return handled.seconds / HANDLED * 1e6


def _memory(stage: Stage, count: int) -> list[int]:
    """Memory of a worker in bytes after each run."""
    with Marks(stage.folder) as marks, stage.cast() as cast:
        places = {"BENCH_BROKER": stage.broker("rabbitmq"), "BENCH_DATABASE": stage.database()}
        wire = cast.contestant("wire", **places)
        wire.do("declare", "ours")
        worker = cast.worker("ours", **places, BENCH_QUEUE="ours", BENCH_MARKS=marks.path)
        held = []
        for _ in range(LOOKS):
            consumed(marks, wire, worker, "bench.insert", "ours", count)
            held.append(worker.memory())
        return held


def know(url: str, keys: int) -> None:
    """Fill the tables with *keys* keys of the measured task and service."""
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in (
            "INSERT INTO eda_sequences (stream, key, epoch, last, version) "
            "SELECT 'bench.keep', 'other ' || number, 1, 1, 1 FROM generate_series(1, :n) number",
            "INSERT INTO eda_cursors (consumer, source, stream, key, epoch, last, parked) "
            "SELECT 'bench.keep', 'ours', 'bench.keep', 'other ' || number, 1, 1, 0 "
            "FROM generate_series(1, :n) number",
        ):
            connection.execute(text(statement), {"n": keys})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM (ANALYZE) eda_sequences, eda_cursors"))
        connection.execute(text("CHECKPOINT"))
    engine.dispose()


def _old(url: str) -> int:
    """The number of expired rows in the inbox."""
    engine = create_engine(url)
    with engine.connect() as connection:
        days = "SELECT count(*) FROM eda_inbox WHERE at < now() - interval '15 days'"
        count = int(connection.scalar(text(days)) or 0)
    engine.dispose()
    return count
