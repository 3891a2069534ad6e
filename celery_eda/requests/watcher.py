"""Polling for the durable replies that this process awaits: one thread for all of them.

Each round is one query for all replies that are due, however many are awaited. The thread starts
with the first wait and ends after the last one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Engine

from celery_eda.core import redaction
from celery_eda.core.forks import on_fork
from celery_eda.core.retry import OUTAGE_DELAY, backoff
from celery_eda.requests.outcomes import ReplyReader
from celery_eda.requests.store import RequestStore, StoredOutcome, unknown_request

log = redaction.logger(__name__)

#: Seconds between two polls for the same reply: the first interval, doubling up to the longest.
POLL = (0.02, 0.5)
#: Replies in one query; SQLite before 3.32 accepts at most 999 parameters.
BATCH = 500


@dataclass(eq=False)
class _Wait:
    """One wait for one reply; a reply may be awaited several times at once.

    Attributes:
        until: when the wait ends without a reply, on the clock of ``time.monotonic``.
        due: when to poll next, on the same clock.
        polls: number of polls so far.
    """

    correlation_id: UUID
    until: float
    due: float = 0.0
    polls: int = 0
    future: Future[Any] = field(default_factory=Future)

    def resolve(self, outcome: Any) -> None:
        with suppress(InvalidStateError):  # cancelled at this very moment
            self.future.set_result(outcome)

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):  # cancelled at this very moment
            self.future.set_exception(error)

    def poll_later(self) -> None:
        now = time.monotonic()
        if now > self.until:
            self.future.cancel()
        self.due = now + backoff(self.polls, *POLL)
        self.polls += 1


def _due(wait: _Wait) -> float:
    return wait.due


class ReplyWatcher:
    """Futures of durable replies. Thread-safe; a forked child starts its own thread."""

    def __init__(self, engine: Engine, requests: RequestStore, reader: ReplyReader) -> None:
        self._engine = engine
        self._requests = requests
        self._reader = reader
        self._reset()
        on_fork(self._reset)

    def _reset(self) -> None:
        # A forked child has neither the thread nor the waiting callers.
        self._changed = threading.Condition()
        self._waits: list[_Wait] = []
        self._thread: threading.Thread | None = None

    def look(self, correlation_id: UUID) -> tuple[Any] | None:
        """Read the database now: a tuple of the result or ``ErrorOutcome``; None without a reply.

        Raises:
            UnknownRequest: this service has made no such request.
        """
        with self._engine.connect() as connection:
            stored = self._requests.outcomes(connection, [correlation_id])
        return self._read(correlation_id, stored)

    def watch(self, correlation_id: UUID, timeout: float) -> Future[Any]:
        """A future of the result or ``ErrorOutcome``. Cancel it to stop waiting.

        The future is cancelled soon after *timeout* seconds without a reply. It fails with
        ``UnknownRequest`` if this service has made no such request. An outage of the database
        does not end the wait; any other error of the database does, as the future's exception.
        """
        # A margin, so that the caller notices its own time-out first.
        wait = _Wait(correlation_id, until=time.monotonic() + timeout + POLL[1])
        with self._changed:
            self._waits.append(wait)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="celery_eda durable replies", daemon=True
                )
                self._thread.start()
            self._changed.notify()
        return wait.future

    # ── the thread ──────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        failures = 0
        while due := self._next_due():
            try:
                self._poll(due)
                failures, pause = 0, POLL[0]  # waits that begin meanwhile share the next query
            except Exception as error:
                if not self._is_temporary(error):
                    for wait in due:
                        wait.fail(error)
                    continue
                log.warning("durable replies cannot be read; trying again: %r", error)
                pause = backoff(failures, *OUTAGE_DELAY)
                failures += 1
            time.sleep(pause)

    def _next_due(self) -> Sequence[_Wait]:
        """Block until waits are due, and return them; empty once no wait is left."""
        with self._changed:
            while True:
                self._waits = [wait for wait in self._waits if not wait.future.done()]
                if not self._waits:
                    self._thread = None
                    return ()
                now = time.monotonic()
                if due := [wait for wait in self._waits if wait.due <= now]:
                    return sorted(due, key=_due)[:BATCH]
                self._changed.wait(min(map(_due, self._waits)) - now)

    def _poll(self, due: Sequence[_Wait]) -> None:
        ids = {wait.correlation_id for wait in due}
        with self._engine.connect() as connection:
            stored = self._requests.outcomes(connection, ids)
        for wait in due:
            try:
                found = self._read(wait.correlation_id, stored)
            except Exception as error:  # unknown or unreadable, which concerns this wait alone
                wait.fail(error)
                continue
            if found is None:
                wait.poll_later()
            else:
                wait.resolve(found[0])

    def _read(
        self, correlation_id: UUID, stored: Mapping[UUID, StoredOutcome | None]
    ) -> tuple[Any] | None:
        if correlation_id not in stored:
            raise unknown_request(correlation_id)
        if (outcome := stored[correlation_id]) is None:
            return None
        decoded = outcome.decode(self._requests.serializer)
        return (self._reader.outcome_in([str(correlation_id), decoded])[1],)

    def _is_temporary(self, error: Exception) -> bool:
        dialect = self._requests.dialect
        return dialect.is_outage(error) or dialect.is_transient(error)
