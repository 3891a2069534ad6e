"""The cost of single steps of the road: ``python -m benchmarks.steps``.

Prints, as Markdown, microseconds of CPU and of time for one message, on PostgreSQL and RabbitMQ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import click

from benchmarks import figures
from benchmarks.contestant import Contestant, Measured
from benchmarks.pairing import interleaved
from benchmarks.stage import Stage

ROUNDS = 15
#: Messages of a step in one round, and of the step that sends one at a time.
COUNT, SENT = 500, 50
STEPS = {
    "captured, filled into a template": "capture",
    "captured, made by Celery": "capture_by_celery",
    "captured by nobody: Celery's checks, a body, an id and a result": "capture_nothing",
    "one row of the outbox written": "write_one",
    "one row written as arrays of one": "write_as_arrays",
    "one row written by psycopg alone": "write_by_driver",
    "a row claimed and made into a message, of 500": "read",
    "the frames of a message": "make_frames",
}
METHODS = ("lz4", "pglz")


@click.command()
def main() -> None:
    """Measure all steps, interleaved; print the medians of 15 rounds."""
    with Stage() as stage, stage.cast() as cast:
        place = {
            "BENCH_BROKER": stage.broker("rabbitmq"),
            "BENCH_DATABASE": stage.database(),
            "BENCH_SETTINGS": '{"eda_send_after_commit": false}',
        }
        steps = cast.contestant("steps", **place)
        steps.do("published", COUNT)
        cases: dict[str, Callable[[], Measured]] = {
            what: partial(steps.do, verb, COUNT) for what, verb in STEPS.items()
        }
        for method in METHODS:
            what = f"a row with 1 KB of text written, of 500, compressed by {method}"
            cases[what] = partial(steps.do, "write_compressed", method, COUNT)
        cases["a message claimed by its id, sent, confirmed and cleared"] = partial(_sent, steps)
        took = interleaved(cases, rounds=ROUNDS)
    click.echo("| for one message | CPU, µs | time, µs |\n|---|---|---|")
    for what, rounds in took.items():
        count = SENT if "by its id" in what else COUNT
        cpu = 1e6 * figures.median([each.cpu for each in rounds]) / count
        time = 1e6 * figures.median([each.seconds for each in rounds]) / count
        click.echo(f"| {what} | {cpu:.4g} | {time:.4g} |")


def _sent(steps: Contestant) -> Measured:
    return steps.do("send_one_by_one", steps.do("published", SENT).value)


if __name__ == "__main__":
    main()
