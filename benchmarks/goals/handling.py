"""S6: the cost of exactly-once to a handler and to a worker."""

from __future__ import annotations

from functools import partial

from benchmarks import figures
from benchmarks.goals.consuming import consumed
from benchmarks.marks import Marks
from benchmarks.pairing import interleaved
from benchmarks.result import Check, Result
from benchmarks.stage import Stage

ROUNDS = 6
#: Handlers run one after the other in one process; messages for a worker.
HANDLERS, MESSAGES = 300, 600


def s6(stage: Stage, scale: float) -> Result:
    """One INSERT: in a reliable task, in a bare transaction, and by workers that ack late."""
    handlers, messages = max(1, round(HANDLERS * scale)), max(2, round(MESSAGES * scale))
    with Marks(stage.folder) as marks, stage.cast() as cast:
        places = {"BENCH_BROKER": stage.broker("rabbitmq"), "BENCH_DATABASE": stage.database()}
        ours = {**places, "BENCH_QUEUE": "ours"}
        plain = {**places, "BENCH_QUEUE": "plain", "BENCH_LATE": "1"}
        alone = cast.contestant("ours", **places)
        took = interleaved(
            {
                "reliable": partial(alone.do, "handle", handlers),
                "bare": partial(alone.do, "handle_bare", handlers),
            },
            rounds=ROUNDS,
        )
        wire = cast.contestant("wire", **places)
        wire.do("declare", "ours", "plain")
        workers = {
            "ours": (cast.worker("ours", **ours, BENCH_MARKS=marks.path), "bench.insert"),
            "plain": (cast.worker("plain", **plain, BENCH_MARKS=marks.path), "plain.insert"),
        }
        runs = interleaved(
            {
                name: partial(consumed, marks, wire, worker, task, name, messages)
                for name, (worker, task) in workers.items()
            },
            rounds=ROUNDS,
        )
    cost = {name: [each.seconds / handlers for each in rounds] for name, rounds in took.items()}
    rates = {name: [each.rate for each in rounds] for name, rounds in runs.items()}
    return Result(
        "S6",
        [
            Check.of(
                "handler with inbox ÷ the same handler in a bare transaction",
                figures.ratios(cost["reliable"], cost["bare"]),
                at_most=1.15,
            ),
            Check.of(
                "rate of a worker with reliable tasks ÷ with plain ones that ack late",
                figures.ratios(rates["ours"], rates["plain"]),
                at_least=0.85,
            ),
        ],
        runs=ROUNDS,
        medians={
            **{f"{name} handler, µs": 1e6 * figures.median(each) for name, each in cost.items()},
            **{f"worker {name}, tasks/s": figures.median(each) for name, each in rates.items()},
        },
        cpu={
            **{
                f"{name} handler": figures.median([each.cpu / handlers * 1e6 for each in rounds])
                for name, rounds in took.items()
            },
            **{
                f"worker {name}": figures.median([each.cpu for each in rounds])
                for name, rounds in runs.items()
            },
        },
        compared=(
            "A handler that inserts one row, delivered without a broker; and workers (prefork, 2 "
            f"slots) that empty a queue of {messages} such tasks."
        ),
        samples={f"worker {name}": each for name, each in rates.items()},
        unit="tasks/s",
        scale=scale,
    )
