"""S16: the rate at which the parked messages of a key are handled once their turn has come."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

from benchmarks import figures
from benchmarks.contestant import Contestant
from benchmarks.goals.consuming import Consumed, consumed
from benchmarks.marks import Marks
from benchmarks.pairing import interleaved
from benchmarks.result import Check, Result
from benchmarks.stage import Stage, Worker, until

ROUNDS = 5
#: Messages parked in one round, and their keys.
PARKED, KEYS = 2000, 4
#: Nobody but the measuring process sends what it has stored.
BY_HAND = '{"eda_send_after_commit": false}'
NO_RELAY = '{"eda_embedded_relay": false}'

_rounds = itertools.count()


@dataclass(frozen=True)
class Drained:
    """A worker, and the service whose messages it parks and then handles."""

    marks: Marks
    service: Contestant
    worker: Worker

    def run(self, count: int, keys: int) -> Consumed:
        """Park *count* messages of *keys* keys, send the first of each, and let all be handled."""
        everything = self.service.do("send_behind_first", count, keys, f"round {next(_rounds)}")
        until(lambda: self.service.do("parked").value == count, f"{count} parked messages")
        self.marks.forget()
        before = self.worker.cpu()
        self.service.do("send_first")
        rate = self.marks.rate(everything.value)
        until(lambda: self.service.do("parked").value == 0, "the end of all messages")
        return Consumed(rate, (self.worker.cpu() - before) / everything.value * 1e6)


def s16(stage: Stage, scale: float) -> Result:
    """Parked messages of a few keys and of one, beside messages without a key from the queue."""
    count = max(2 * KEYS, round(PARKED * scale))
    with Marks(stage.folder) as marks, stage.cast() as cast:
        places = {"BENCH_BROKER": stage.broker("rabbitmq"), "BENCH_DATABASE": stage.database()}
        wire = cast.contestant("wire", **places)
        wire.do("declare", "ours")
        ours = {**places, "BENCH_QUEUE": "ours"}
        service = cast.contestant("ours", **ours, BENCH_SETTINGS=BY_HAND)
        worker = cast.worker("ours", **ours, BENCH_SETTINGS=NO_RELAY, BENCH_MARKS=marks.path)
        drained = Drained(marks, service, worker)
        runs = interleaved(
            {
                "no key": partial(consumed, marks, wire, worker, "bench.insert", "ours", count),
                f"{KEYS} keys": partial(drained.run, count, KEYS),
                "one key": partial(drained.run, count, 1),
            },
            rounds=ROUNDS,
        )
    rates = {name: [each.rate for each in rounds] for name, rounds in runs.items()}
    return Result(
        "S16",
        [
            Check.of(
                f"rate of {count} parked messages of {KEYS} keys ÷ of as many without a key",
                figures.ratios(rates[f"{KEYS} keys"], rates["no key"]),
                at_least=0.7,
            ),
            Check.of(
                f"rate of {count} parked messages of one key ÷ of as many without a key",
                figures.ratios(rates["one key"], rates["no key"]),
                at_least=0.5,
            ),
        ],
        runs=ROUNDS,
        medians={f"{name}, messages/s": figures.median(each) for name, each in rates.items()},
        cpu={name: figures.median([each.cpu for each in rounds]) for name, rounds in runs.items()},
        compared=(
            f"{count} messages, each of which inserts a row, by a worker of two processes on "
            "PostgreSQL and RabbitMQ: without a key, from a full queue; of a few keys and of one, "
            "parked until the first message of each key is sent. A key is handled by one process "
            "at a time."
        ),
        samples=rates,
        unit="messages/s",
        scale=scale,
    )
