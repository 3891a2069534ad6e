"""Where the replies to one process come in, and find the one who waits for each.

One thread takes from one connection, however many requests are under way. A reply that nobody
waits for (late, a copy, forged, malformed) is counted, dropped, and told in one line of the log.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

from celery_eda import addresses, redaction
from celery_eda.reading import Reading
from celery_eda.retry import backoff
from celery_eda.transports.base import ReplyQueues

log = redaction.logger(__name__)

#: Seconds between two tries while the broker is away.
OUTAGE_DELAY = (0.1, 5.0)
#: Seconds of a wait for replies, between two looks whether there is something else to do.
WAIT = 1.0
#: Ended requests that are remembered, to tell a late reply from a forged one.
REMEMBERED = 10_000
#: Seconds that a process which ends gives its queues to go.
EXIT_PATIENCE = 2.0


class Mailbox:
    """The replies to one process. For any thread; made afresh in every child that is forked.

    Attributes:
        dropped: how many replies nobody waited for, by reason.
    """

    def __init__(self, make_queues: Callable[[], ReplyQueues], reading: Reading) -> None:
        self._make_queues = make_queues
        self._reading = reading
        self._start_afresh()
        os.register_at_fork(after_in_child=self._start_afresh)
        atexit.register(self.close)

    def _start_afresh(self) -> None:
        # A forked child has neither the thread nor the right to the parent's connection.
        self.address = addresses.of_process()
        self.dropped: Counter[str] = Counter()
        # Garbage may be collected anywhere: a dropped handle shuts its queue in whatever thread.
        self._lock = threading.RLock()
        self._waiting: WeakValueDictionary[str, Future[Any]] = WeakValueDictionary()
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._wanted: set[str] = {self.address}
        self._opened: set[str] = set()
        self._queues: ReplyQueues | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    # ── for those who wait ──────────────────────────────────────────────────────────────────

    def expect(self, correlation_id: str) -> Future[Any]:
        """Where the reply will be: an outcome, or :class:`Failed`. Dropping it gives it up."""
        future: Future[Any] = Future()
        with self._lock:
            self._waiting[correlation_id] = future
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="celery_eda replies", daemon=True
                )
                self._thread.start()
        return future

    def give_up(self, correlation_id: str) -> None:
        """Nobody waits for this one any more."""
        with self._lock:
            if self._waiting.pop(correlation_id, None) is not None:
                self._remember(correlation_id, "late")

    def settle(self, correlation_id: str, outcome: Any) -> bool:
        """Give *outcome* to the one who waits for it; whether there is one."""
        with self._lock:
            future = self._waiting.pop(correlation_id, None)
            if future is None:
                return False
            self._remember(correlation_id, "copy")
        with suppress(InvalidStateError):  # given up in this very moment
            future.set_result(outcome)
        return True

    def is_open(self, name: str) -> bool:
        """Whether the queue *name* is there, as far as is known here."""
        return name in self._opened

    def open(self, name: str) -> None:
        """Take from the queue *name* too, as soon as the broker is there."""
        with self._lock:
            self._wanted.add(name)
        self._wake()

    def shut(self, name: str) -> None:
        """Delete the queue *name*."""
        with self._lock:
            self._wanted.discard(name)
        self._wake()

    def close(self) -> None:
        """Delete all queues, and end."""
        if self._thread is None:
            return
        with self._lock:
            self._wanted.clear()
        self._closing.set()
        self._wake()
        self._thread.join(EXIT_PATIENCE)

    def _wake(self) -> None:
        if (queues := self._queues) is not None:
            queues.wake()

    # ── the thread ──────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        failures = 0
        while not self._closing.is_set():
            try:
                self._queues = queues = self._make_queues()
                try:
                    while self._adjust(queues):
                        for message in queues.take(WAIT):
                            self._deliver(message)
                        failures = 0
                finally:
                    self._opened.clear()
                    queues.drop()
            except Exception as error:
                log.warning("replies cannot be received, trying again: %r", error)
                self._closing.wait(backoff(failures, *OUTAGE_DELAY))
                failures += 1

    def _adjust(self, queues: ReplyQueues) -> bool:
        """Open and close queues until they are those that are wanted; False if none is."""
        with self._lock:
            wanted = set(self._wanted)
        for name in wanted - self._opened:
            queues.open(name)
            self._opened.add(name)
        for name in self._opened - wanted:
            queues.close(name)
            self._opened.discard(name)
        return bool(wanted)

    def _deliver(self, message: Any) -> None:
        try:
            correlation_id, outcome = self._reading.read(message)
        except Exception as error:
            self._drop("malformed", f"{type(error).__name__}: {error}")
            return
        if not self.settle(correlation_id, outcome):
            self._drop(self._ended.get(correlation_id, "unknown"), correlation_id)

    def _drop(self, why: str, what: str) -> None:
        self.dropped[why] += 1
        log.warning("a reply is dropped, %s: %s", why, ascii(what[:200])[1:-1])

    def _remember(self, correlation_id: str, what_comes: str) -> None:
        self._ended[correlation_id] = what_comes
        if len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
