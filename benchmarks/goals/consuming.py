"""The speed of a worker that empties a queue of tasks."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.contestant import Contestant
from benchmarks.marks import Marks
from benchmarks.stage import Worker


@dataclass(frozen=True)
class Consumed:
    """The speed of one run of a worker.

    Attributes:
        rate: tasks per second, from the start of the first to that of the last.
        cpu: microseconds of CPU per task, of all processes of the worker.
    """

    rate: float
    cpu: float


def consumed(
    marks: Marks, wire: Contestant, worker: Worker, task: str, queue: str, count: int
) -> Consumed:
    """Write *count* messages to the queue of *worker* at full speed, and let it handle them."""
    marks.forget()
    before = worker.cpu()
    wire.do("send_tasks", task, queue, count)
    rate = marks.rate(count)
    return Consumed(rate, (worker.cpu() - before) / count * 1e6)
