"""The times at which tasks started, as reported by the workers."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

from typing_extensions import Self

#: Seconds to wait for missing marks.
PATIENCE = 60.0
#: The worker's own end waits in the socket's queue, which is short: somebody has to read it.
LONGEST = 64


class Marks:
    """Receives ``benchmarks.contestants.marks`` on a socket, in a thread of its own.

    Times are those of ``time.monotonic``, which all processes of a machine share.
    """

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / f"marks-{id(self)}")
        self._line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._line.bind(self.path)
        self._changed = threading.Condition()
        self._moments: dict[int, float] = {}

    def __enter__(self) -> Self:
        threading.Thread(target=self._hear, daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self.path)

    def forget(self) -> None:
        """Forget all marks."""
        with self._changed:
            self._moments = {}

    def of(self, count: int) -> dict[int, float]:
        """The times by number, as soon as there are *count* of them.

        Raises:
            TimeoutError: some are missing.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._moments) >= count, PATIENCE):
                raise TimeoutError(f"{len(self._moments)} of {count} tasks have started")
            return dict(self._moments)

    def when(self, number: int) -> float:
        """The time at which the task with this *number* started, as soon as it has.

        Raises:
            TimeoutError: the task has not started.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: number in self._moments, PATIENCE):
                raise TimeoutError(f"the task {number} has not started")
            return self._moments[number]

    def rate(self, count: int) -> float:
        """Tasks per second, from the first of *count* to the last."""
        moments = sorted(self.of(count).values())
        return (count - 1) / (moments[-1] - moments[0])

    def _hear(self) -> None:
        while line := self._line.recv(LONGEST):
            number, moment = line.split()
            with self._changed:
                self._moments.setdefault(int(number), float(moment))
                self._changed.notify_all()
        self._line.close()
