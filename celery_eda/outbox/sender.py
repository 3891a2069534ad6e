"""Sends messages right after the commit, from the process that committed them.

They leave without a poll and without a wake-up. If this process cannot send a message at once, or
dies first, any relay finds the message in the outbox.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Sequence

from sqlalchemy.exc import SQLAlchemyError

from celery_eda.core import redaction
from celery_eda.core.forks import on_fork
from celery_eda.core.retry import OUTAGE_DELAY, backoff
from celery_eda.outbox.relay import Relay

log = redaction.logger(__name__)

#: Calls that may wait; beyond them the committing process leaves its messages to the relay.
MOST_WAITING = 100_000
#: Seconds that a sending takes at most while the cores are idle.
IDLE_DURATION = 0.004
#: The longest pause after a sending, as a multiple of its duration.
LONGEST_PAUSE_RATIO = 3.0
#: The longest pause after a sending, in seconds.
LONGEST_PAUSE = 0.05
#: Seconds that an ending process waits for its last messages to leave.
EXIT_PATIENCE = 2.0
#: Seconds that a fork waits for the sending in progress.
FORK_PATIENCE = 1.0


class CommitSender:
    """Sends the messages that this process has just committed, on a background thread.

    The sender gets row ids and claims the rows like any relay, so it never sends a message that
    was not committed. It leaves to the relay what it cannot send at once.

    After each sending it pauses for as long as the sending took, and longer on a busy machine: it
    works at most half of the time, and a quarter where the cores are busy. A single message
    leaves at once. The messages of a busy process leave in batches, which cost less.
    """

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._thread: threading.Thread | None
        self._reset()
        on_fork(self._reset, before=self._pause, in_parent=self._resume)
        atexit.register(self.finish)

    def _reset(self) -> None:
        # A forked child has neither the thread nor the right to the parent's connection.
        self._waiting: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        self._thread = None
        self._starting = threading.Lock()
        self._sending = False
        # Locked while a transaction is open. A child that is forked in the middle of one would
        # inherit SQLite's record of its locks, and wait for them forever.
        self._idle = threading.Lock()

    def _pause(self) -> None:
        self._paused = self._idle.acquire(timeout=FORK_PATIENCE)

    def _resume(self) -> None:
        if self._paused:
            self._idle.release()

    def send(self, ids: Sequence[int]) -> None:
        """Send the rows with these ids soon. Returns at once, and may be called by any thread."""
        if self._waiting.qsize() > MOST_WAITING:
            return
        self._waiting.put(list(ids))
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="celery_eda sender", daemon=True)
                thread.start()
                self._thread = thread

    def finish(self) -> None:
        """Wait until the waiting messages are sent, for at most ``EXIT_PATIENCE`` seconds."""
        deadline = time.monotonic() + EXIT_PATIENCE
        while self._busy() and time.monotonic() < deadline:
            time.sleep(0.005)

    def _busy(self) -> bool:
        return self._thread is not None and (self._sending or not self._waiting.empty())

    def _run(self) -> None:
        relay, failures, resume_at = self._relay.another(), 0, 0.0
        while True:
            ids = self._waiting.get()
            self._sending = True
            time.sleep(max(0.0, resume_at - time.monotonic()))
            began = time.monotonic()
            while len(ids) < relay.settings.relay_batch and not self._waiting.empty():
                ids += self._waiting.get()
            with self._idle:
                sent = self._sent(relay, ids)
            if sent:
                failures = 0
            else:
                time.sleep(backoff(failures, *OUTAGE_DELAY))
                failures += 1
            resume_at = time.monotonic() + pause_after(time.monotonic() - began)
            self._sending = False

    def _sent(self, relay: Relay, ids: list[int]) -> bool:
        try:
            for start in range(0, len(ids), relay.settings.relay_batch):
                if relay.send(ids[start : start + relay.settings.relay_batch]).unknown:
                    return False
        except SQLAlchemyError as error:
            log.warning("messages just committed are left to the relay: %s", error)
            return False
        except Exception:  # this thread is the only one
            log.exception("messages just committed are left to the relay")
            relay.close()
            return False
        return True


def pause_after(took: float) -> float:
    """Seconds to pause after a sending that *took* so many seconds."""
    return min(took * min(max(1.0, took / IDLE_DURATION), LONGEST_PAUSE_RATIO), LONGEST_PAUSE)
