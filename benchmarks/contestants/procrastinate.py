"""procrastinate: jobs in the database itself, deferred many at once and one by one.

``python -m benchmarks.contestants.procrastinate work`` is a worker of two jobs at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from procrastinate import App, PsycopgConnector, SyncPsycopgConnector

from benchmarks.contestants import marks
from benchmarks.contestants.serving import PAYLOAD, environment, serve

url = environment("DATABASE").replace("+psycopg", "")
works = sys.argv[1:] == ["work"]
connector = PsycopgConnector if works else SyncPsycopgConnector
app = App(connector=connector(conninfo=url))


@app.task(name="carry")
def carry(payload: str) -> None:
    """Do nothing; the job carries about 1 KB."""


@app.task(name="start")
def start(number: int) -> None:
    """Report the start."""
    marks.started(number)


def prepare() -> None:
    """Connect, and create its tables."""
    app.open()
    app.schema_manager.apply_schema()


def fill(count: int) -> None:
    """Defer *count* jobs in one statement."""
    carry.batch_defer(*[{"payload": PAYLOAD}] * count)


def publish_starts(count: int, first: int) -> None:
    """Defer *count* jobs, each in a transaction of its own."""
    for number in range(first, first + count):
        start.defer(number=number)


def start_at_once(count: int, pause: float) -> list[list[float]]:
    """Defer *count* jobs with pauses; returns the times before and after each."""
    moments = []
    for number in range(count):
        before = time.monotonic()
        start.defer(number=number)
        moments.append([before, time.monotonic()])
        time.sleep(pause)
    return moments


VERBS: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (prepare, fill, publish_starts, start_at_once)
}

if __name__ == "__main__":
    if works:
        app.run_worker(concurrency=2, delete_jobs="successful", listen_notify=True)
    else:
        serve(VERBS)
