"""S11: the cost of the extension to an app that loads it without using it."""

from __future__ import annotations

from functools import partial

from benchmarks import figures
from benchmarks.goals.consuming import consumed
from benchmarks.marks import Marks
from benchmarks.pairing import interleaved
from benchmarks.result import Check, Result
from benchmarks.stage import Stage

#: Many short rounds: the goal is two percent, and a single disturbance exceeds that.
ROUNDS_OF_PUBLISHING, ROUNDS_OF_CONSUMING = 31, 9
PUBLISHED, CONSUMED = 200, 600
TARGET = 1.02


def s11(stage: Stage, scale: float) -> Result:
    """Plain tasks of two apps, one of them extended: CPU per message, published and consumed."""
    published, many = max(1, round(PUBLISHED * scale)), max(2, round(CONSUMED * scale))
    with Marks(stage.folder) as marks, stage.cast() as cast:
        places = {"BENCH_BROKER": stage.broker("rabbitmq"), "BENCH_DATABASE": stage.database()}
        apps = {
            "plain": {**places, "BENCH_QUEUE": "plain"},
            "extended": {**places, "BENCH_QUEUE": "extended", "BENCH_EDA": "1"},
        }
        publishers = {name: cast.contestant("plain", **where) for name, where in apps.items()}
        sent = interleaved(
            {name: partial(each.do, "fill", published) for name, each in publishers.items()},
            rounds=ROUNDS_OF_PUBLISHING,
            warm_ups=2,
        )
        wire = cast.contestant("wire", **places)
        for queue in apps:
            wire.do("empty", queue)  # declared by the publishers
        workers = {
            name: cast.worker("plain", **where, BENCH_MARKS=marks.path)
            for name, where in apps.items()
        }
        runs = interleaved(
            {
                name: partial(consumed, marks, wire, worker, "plain.start", name, many)
                for name, worker in workers.items()
            },
            rounds=ROUNDS_OF_CONSUMING,
            warm_ups=2,
        )
    publishing = {
        name: [each.cpu / published * 1e6 for each in rounds] for name, rounds in sent.items()
    }
    consuming = {name: [each.cpu for each in rounds] for name, rounds in runs.items()}
    rates = {name: [each.rate for each in rounds] for name, rounds in runs.items()}
    return Result(
        "S11",
        [
            Check.of(
                f"CPU per message {what}, extended ÷ plain",
                figures.ratios(of["extended"], of["plain"]),
                at_most=TARGET,
            )
            for what, of in (("published", publishing), ("consumed", consuming))
        ],
        runs=ROUNDS_OF_CONSUMING,
        medians={f"worker {name}, tasks/s": figures.median(each) for name, each in rates.items()},
        cpu={
            **{f"{name}, published": figures.median(each) for name, each in publishing.items()},
            **{f"{name}, consumed": figures.median(each) for name, each in consuming.items()},
        },
        compared=(
            f"Ordinary tasks: {published} a round published to RabbitMQ in "
            f"{ROUNDS_OF_PUBLISHING} rounds, {many} a round consumed by a worker with two slots. "
            "The extended worker has its relay beside it, which looks at an empty outbox."
        ),
        samples={f"{name}, published": each for name, each in publishing.items()},
        unit="µs of CPU per message",
        scale=scale,
    )
