"""S5: from the commit to the start of the task, beside a plain ``.delay()``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks import figures
from benchmarks.contestant import Contestant
from benchmarks.marks import Marks
from benchmarks.pairing import interleaved
from benchmarks.result import Check, Result
from benchmarks.stage import Stage

ROUNDS = 6
#: Messages of one round, and the seconds between two of them.
MESSAGES, PAUSE = 50, 0.02
PLAIN, INLINE, RELAYED = "plain .delay()", "sent by the committing process", "sent by a relay"


def s5(stage: Stage, scale: float) -> Result:
    """Fifty messages a second, each from a transaction of its own, to an idle worker."""
    count = max(1, round(MESSAGES * scale))
    with Marks(stage.folder) as marks, stage.cast() as cast:
        ours = {
            "BENCH_BROKER": stage.broker("rabbitmq"),
            "BENCH_DATABASE": stage.database(),
            "BENCH_MARKS": marks.path,
        }
        plain = {**ours, "BENCH_QUEUE": "plain"}
        cast.worker("plain", **plain)
        cast.worker("ours", **ours, BENCH_SETTINGS='{"eda_embedded_relay": false}')
        # The polling relay runs in both cases; in the first it finds nothing to send.
        cast.celery("ours", "eda", "relay", **ours)
        publish: dict[str, tuple[Contestant, str]] = {
            PLAIN: (cast.contestant("plain", **plain), "start_at_once"),
            INLINE: (cast.contestant("ours", **ours), "start_after_commit"),
            RELAYED: (
                cast.contestant("ours", **ours, BENCH_SETTINGS='{"eda_send_after_commit": false}'),
                "start_after_commit",
            ),
        }
        cases: dict[str, Callable[[], tuple[list[float], list[float]]]] = {
            name: partial(_latencies, marks, *who, count) for name, who in publish.items()
        }
        measured = interleaved(cases, rounds=ROUNDS, warm_ups=2)
    before = {name: [one for one, _ in rounds] for name, rounds in measured.items()}
    after = {name: [one for _, one in rounds] for name, rounds in measured.items()}
    p50 = {name: [figures.median(one) for one in rounds] for name, rounds in before.items()}
    everything = {name: [each for one in rounds for each in one] for name, rounds in before.items()}
    p99 = {name: [figures.percentile(each, 0.99)] for name, each in everything.items()}
    checks = [
        Check.of(f"{what} ÷ {PLAIN}", figures.ratios(of[name], of[PLAIN]), at_most=target)
        for what, of, name, target in (
            (f"p50, {INLINE}", p50, INLINE, 1.15),
            (f"p50, {RELAYED}", p50, RELAYED, 2.0),
            (f"p99, {INLINE}", p99, INLINE, 2.0),
        )
    ]
    medians: dict[str, float] = {}
    for name, each in everything.items():
        medians[f"{name}, p50 ms"] = 1000 * figures.percentile(each, 0.5)
        medians[f"{name}, p99 ms"] = 1000 * figures.percentile(each, 0.99)
        since = [value for one in after[name] for value in one]
        medians[f"{name}, p50 ms after the commit"] = 1000 * figures.percentile(since, 0.5)
    return Result(
        "S5",
        checks,
        runs=ROUNDS,
        medians=medians,
        compared=(
            f"{count} messages a round, {PAUSE * 1000:g} ms apart, to a worker with two slots "
            "(prefork) over RabbitMQ; from just before the COMMIT, in which the outbox is written, "
            "or before .delay(), to the first line of the task. p99 over all rounds."
        ),
        samples={name: [1000 * each for each in rounds] for name, rounds in p50.items()},
        unit="ms, p50 of a round",
        scale=scale,
    )


def _latencies(
    marks: Marks, publisher: Contestant, verb: str, count: int
) -> tuple[list[float], list[float]]:
    """Seconds to the start of each task, from just before and from just after its commit."""
    marks.forget()
    moments = publisher.do(verb, count, PAUSE).value
    started = marks.of(count)
    return (
        [started[number] - before for number, (before, _) in enumerate(moments)],
        [started[number] - after for number, (_, after) in enumerate(moments)],
    )
