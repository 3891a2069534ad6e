"""Right after the commit: the process that committed sends its messages itself.

They leave without a poll and without a wake-up. What this process cannot send at once, or dies
before it has sent, is found in the outbox by any relay.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence

from sqlalchemy.exc import SQLAlchemyError

from celery_eda import redaction
from celery_eda.relay import Relay
from celery_eda.retry import OUTAGE_DELAY, backoff

log = redaction.logger(__name__)

#: Ids handed over and not sent yet, after which the committing process leaves them to the relay.
LONGEST_HANDOFF = 100_000
#: Seconds that a sending takes where nobody else wants the cores, or less.
UNDISTURBED = 0.004
#: How many times as long as a sending took the sender rests, at the most, and how many seconds.
MOST_RESTS, LONGEST_REST = 3.0, 0.05
#: Seconds that a process which ends waits for its last messages to leave.
EXIT_PATIENCE = 2.0
#: Seconds that a fork waits for the sending that is under way.
FORK_PATIENCE = 1.0


class Sender:
    """Sends what this process has just committed, on a background thread.

    It is handed ids and claims the rows like any relay, so it never sends what was not committed.
    What it cannot send at once it leaves to the relay.

    After each sending it rests for as long as that took, or longer if others want the cores, so
    that it is at work for half of the time at the most, and for a quarter on a busy machine. A
    single message leaves at once; those of a busy process leave in batches, which costs each of
    them less.
    """

    def __init__(self, make_relay: Callable[[], Relay]) -> None:
        self.make_relay = make_relay
        self._thread: threading.Thread | None
        self._start_afresh()
        os.register_at_fork(
            before=self._pause,
            after_in_parent=self._resume,
            after_in_child=self._start_afresh,
        )
        atexit.register(self.finish)

    def _start_afresh(self) -> None:
        # A forked child has neither the thread nor the right to the parent's connection.
        self._waiting: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        self._thread = None
        self._starting = threading.Lock()
        self._sending = False
        # A child that is forked in the middle of a transaction inherits what SQLite knows of its
        # locks, and would wait for them for ever.
        self._between = threading.Lock()

    def _pause(self) -> None:
        self._paused = self._between.acquire(timeout=FORK_PATIENCE)

    def _resume(self) -> None:
        if self._paused:
            self._between.release()

    def hand_off(self, ids: Sequence[int]) -> None:
        """Send the rows with these ids soon. Returns at once."""
        if self._waiting.qsize() > LONGEST_HANDOFF:
            return
        self._waiting.put(list(ids))
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="celery_eda sender", daemon=True
                )
                self._thread.start()

    def finish(self) -> None:
        """Wait, not for long, until what was handed off has left."""
        deadline = time.monotonic() + EXIT_PATIENCE
        while self._busy() and time.monotonic() < deadline:
            time.sleep(0.005)

    def _busy(self) -> bool:
        return self._thread is not None and (self._sending or not self._waiting.empty())

    def _run(self) -> None:
        relay, failures, rested = self.make_relay(), 0, 0.0
        while True:
            ids = self._waiting.get()
            self._sending = True
            time.sleep(max(0.0, rested - time.monotonic()))
            began = time.monotonic()
            while len(ids) < relay.settings.relay_batch and not self._waiting.empty():
                ids += self._waiting.get()
            with self._between:
                sent = self._sent(relay, ids)
            if sent:
                failures = 0
            else:
                time.sleep(backoff(failures, *OUTAGE_DELAY))
                failures += 1
            rested = time.monotonic() + rest_after(time.monotonic() - began)
            self._sending = False

    def _sent(self, relay: Relay, ids: list[int]) -> bool:
        try:
            for start in range(0, len(ids), relay.settings.relay_batch):
                if relay.send(ids[start : start + relay.settings.relay_batch]).unknown:
                    return False
        except SQLAlchemyError as error:
            log.warning("what was just committed is left to the relay: %s", error)
            return False
        except Exception:  # this thread is the only one
            log.exception("what was just committed is left to the relay")
            relay.close()
            return False
        return True


def rest_after(took: float) -> float:
    """Seconds of rest after a sending that *took* so many."""
    return min(took * min(max(1.0, took / UNDISTURBED), MOST_RESTS), LONGEST_REST)
