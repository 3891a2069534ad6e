"""Where in a queue there may be something to take.

While an old transaction is open, whatever was taken stays in the way of the next claim, as dead
rows. So a claim begins where the last one ended. What becomes free behind that is told with its
id, and moves the mark back. What nobody tells is found by a look at the whole queue now and then:
that somebody's claim was undone, or that a row was changed by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

from celery_eda.dialects.queueing import RANKS, Passed

#: Seconds at least between two looks at the whole of a queue.
REST = 0.9
#: How many times as long as such a look took it rests at least: it costs a twentieth at most.
RESTS = 20


class Marks:
    """Those of one taker, by queue and rank: everything up to there is taken."""

    def __init__(self) -> None:
        self._marks: dict[str, list[int]] = {}
        self._whole: dict[str, float] = {}

    def claimed(self, queue: str, claim: Callable[[Passed], Sequence[Any]]) -> Sequence[Any]:
        """The rows that *claim* finds in *queue* behind the marks, which move on behind them."""
        begun = monotonic()
        if is_whole := begun >= self._whole.get(queue, 0.0):
            self._marks[queue] = [0] * RANKS
        marks = self._marks[queue]
        rows = claim(marks)
        for row in rows:
            marks[row.rank] = max(marks[row.rank], row.id)
        if is_whole:
            ended = monotonic()
            self._whole[queue] = ended + max(REST, RESTS * (ended - begun))
        return rows

    def move_back(self, lowest: Mapping[str, int]) -> None:
        """In each queue there may be something from its *lowest* id on, whatever its rank."""
        for queue, id_ in lowest.items():
            if queue in self._marks:
                self._marks[queue] = [min(mark, id_ - 1) for mark in self._marks[queue]]

    def forget(self) -> None:
        """There may be something anywhere."""
        self._marks.clear()
        self._whole.clear()
