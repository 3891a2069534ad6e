"""Replies to one process: each resolves the future that waits for its correlation id.

One thread consumes over one connection, however many requests are pending. A reply that no future
waits for (late, a copy, forged, malformed) is dropped, counted, and logged in one line.
"""

from __future__ import annotations

import atexit
import threading
from collections import Counter, OrderedDict
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

from celery_eda.brokers import Brokers, ReplyConsumer
from celery_eda.core import addresses, redaction
from celery_eda.core.forks import on_fork
from celery_eda.core.retry import OUTAGE_DELAY, backoff
from celery_eda.requests.outcomes import ReplyReader

log = redaction.logger(__name__)

#: Seconds for which one read waits for replies.
WAIT = 1.0
#: The most finished requests that are remembered, to distinguish late replies from forged ones.
REMEMBERED = 10_000
#: Seconds for which a process that exits waits for the deletion of its queues.
EXIT_TIMEOUT = 2.0


class Mailbox:
    """Receiver of the replies to one process. Thread-safe; a forked child starts its own.

    Attributes:
        address: the reply address of this process, a queue's name.
        dropped: number of dropped replies by reason: late, copy, unknown, malformed.
    """

    def __init__(self, brokers: Brokers, reader: ReplyReader) -> None:
        self._brokers = brokers
        self._reader = reader
        self._reset()
        on_fork(self._reset)
        atexit.register(self.close)

    def _reset(self) -> None:
        # A forked child has no thread, and must not use the parent's connection.
        self.address = addresses.of_process()
        self.dropped: Counter[str] = Counter()
        # Reentrant: garbage collection may drop a handle, and so close its queue, in any thread
        # at any time.
        self._lock = threading.RLock()
        self._waiting: WeakValueDictionary[str, Future[Any]] = WeakValueDictionary()
        self._finished: OrderedDict[str, str] = OrderedDict()
        self._wanted: set[str] = {self.address}
        self._opened: set[str] = set()
        self._queues: ReplyConsumer | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    # ── for requesters ──────────────────────────────────────────────────────────────────────

    def expect(self, correlation_id: str) -> Future[Any]:
        """A future of the result or :class:`ErrorOutcome`; it is referred to weakly.

        Once the caller drops the future, a reply to it is dropped too.

        Raises:
            ConfigurationError: the broker has no reply queues.
        """
        self._brokers.check_replies()
        future: Future[Any] = Future()
        with self._lock:
            self._waiting[correlation_id] = future
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="celery_eda replies", daemon=True
                )
                self._thread.start()
        return future

    def cancel(self, correlation_id: str) -> None:
        """Stop waiting for this reply."""
        with self._lock:
            if self._waiting.pop(correlation_id, None) is not None:
                self._remember(correlation_id, "late")

    def settle(self, correlation_id: str, outcome: Any) -> bool:
        """Resolve the future that waits for *correlation_id*; returns False if there is none."""
        with self._lock:
            future = self._waiting.pop(correlation_id, None)
            if future is None:
                return False
            self._remember(correlation_id, "copy")
        with suppress(InvalidStateError):  # cancelled at this very moment
            future.set_result(outcome)
        return True

    def is_open(self, name: str) -> bool:
        """True if this process has declared the queue *name* on its current connection."""
        return name in self._opened

    def open(self, name: str) -> None:
        """Consume from the queue *name* too, as soon as the broker is reachable."""
        with self._lock:
            self._wanted.add(name)
        self._wake()

    def discard(self, name: str) -> None:
        """Delete the queue *name*."""
        with self._lock:
            self._wanted.discard(name)
        self._wake()

    def close(self) -> None:
        """Delete all queues, and stop the thread."""
        if self._thread is None:
            return
        with self._lock:
            self._wanted.clear()
        self._closing.set()
        self._wake()
        self._thread.join(EXIT_TIMEOUT)

    def _wake(self) -> None:
        if (queues := self._queues) is not None:
            queues.wake()

    # ── the thread ──────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        failures = 0
        while not self._closing.is_set():
            try:
                self._queues = queues = self._brokers.consume_replies()
                try:
                    while self._adjust(queues):
                        for message in queues.take(WAIT):
                            self._deliver(message)
                        failures = 0
                finally:
                    self._opened.clear()
                    queues.drop()
            except Exception as error:
                log.warning("replies cannot be received; trying again: %r", error)
                self._closing.wait(backoff(failures, *OUTAGE_DELAY))
                failures += 1

    def _adjust(self, queues: ReplyConsumer) -> bool:
        """Open and delete queues to match those wanted; returns False if none is wanted."""
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
            correlation_id, outcome = self._reader.read(message)
        except Exception as error:
            self._drop("malformed", f"{type(error).__name__}: {error}")
            return
        if not self.settle(correlation_id, outcome):
            self._drop(self._finished.get(correlation_id, "unknown"), correlation_id)

    def _drop(self, reason: str, what: str) -> None:
        self.dropped[reason] += 1
        log.warning("a reply is dropped, %s: %s", reason, ascii(what[:200])[1:-1])

    def _remember(self, correlation_id: str, reason: str) -> None:
        """Note why a further reply to a finished request will be dropped."""
        self._finished[correlation_id] = reason
        if len(self._finished) > REMEMBERED:
            self._finished.popitem(last=False)
