"""An ordinary Celery app, without the extension, on a database as its broker.

Its tasks leave lines in files of ``ROAD_FOLDER``.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery

import celery_eda  # noqa: F401  # which is what makes the broker known

app = Celery("plain", broker=os.environ["ROAD_BROKER"], backend=os.environ.get("ROAD_RESULTS"))
app.conf.update(
    worker_prefetch_multiplier=4,
    task_acks_late=os.environ.get("ROAD_LATE") == "1",
    task_reject_on_worker_lost=True,
    broker_connection_retry_on_startup=True,
)


@app.task(name="plain.note")
def note(what: object, after: float = 0.0) -> object:
    """Leaves a line with *what*, and the time."""
    time.sleep(after)
    with Path(os.environ["ROAD_FOLDER"], "notes").open("a") as file:
        file.write(f"{what} {time.time()}\n")
    return what


@app.task(name="plain.total")
def total(numbers: list[int]) -> int:
    return sum(numbers)
