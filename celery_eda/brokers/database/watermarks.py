"""Watermarks: the point in a queue up to which nothing is left to claim.

While an old transaction is open, claimed messages stay in the index as dead rows, and a claim that
began at the start would read them all. So a claim begins where the last one ended. A message that
becomes free behind that point is announced with its id, which lowers the watermark. Changes that
nobody announces (a claim that was rolled back, a row edited by hand) are found by a scan of the
whole queue now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

from celery_eda.brokers.database.queueing import RANKS, Passed

#: Seconds at least between two scans of a whole queue.
SCAN_INTERVAL = 0.9
#: The pause after a scan, as a multiple of the scan's duration: scans take a twentieth at most.
PAUSES_PER_SCAN = 20


class Watermarks:
    """The watermarks of one taker, by queue and rank: every id up to one has been claimed."""

    def __init__(self) -> None:
        self._marks: dict[str, list[int]] = {}
        self._next_scan: dict[str, float] = {}

    def claimed(self, queue: str, claim: Callable[[Passed], Sequence[Any]]) -> Sequence[Any]:
        """The rows that *claim* finds in *queue* above the watermarks, which rise above them."""
        begun = monotonic()
        if is_scan := begun >= self._next_scan.get(queue, 0.0):
            self._marks[queue] = [0] * RANKS
        marks = self._marks[queue]
        rows = claim(marks)
        for row in rows:
            marks[row.rank] = max(marks[row.rank], row.id)
        if is_scan:
            ended = monotonic()
            pause = max(SCAN_INTERVAL, PAUSES_PER_SCAN * (ended - begun))
            self._next_scan[queue] = ended + pause
        return rows

    def lower(self, lowest: Mapping[str, int]) -> None:
        """Lower the watermarks of each queue, in every rank, below its *lowest* free id."""
        for queue, id_ in lowest.items():
            if queue in self._marks:
                self._marks[queue] = [min(mark, id_ - 1) for mark in self._marks[queue]]

    def reset(self) -> None:
        """Forget all watermarks; the next claim of each queue scans the whole queue."""
        self._marks.clear()
        self._next_scan.clear()
