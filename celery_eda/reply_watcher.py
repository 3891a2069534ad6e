"""Durable replies that this process awaits: one thread looks for all of them in the database.

Each look is one query for every reply that is due, however many are awaited. The thread starts
with the first wait and ends after the last one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Engine

from celery_eda import redaction
from celery_eda.reading import Reading
from celery_eda.requests import Requests, StoredOutcome, unknown_request
from celery_eda.retry import backoff

log = redaction.logger(__name__)

#: Seconds between two looks for the same reply: few at first, doubling up to the most.
LOOK = (0.02, 0.5)
#: Seconds between two looks while the database is away.
OUTAGE_DELAY = (0.1, 5.0)
#: Replies that one query asks for; SQLite may have been built with a limit of 999 parameters.
BATCH = 500


@dataclass(eq=False)
class _Wait:
    """One wait for one reply; a reply may be awaited several times at once.

    Attributes:
        until: when the wait ends without a reply; ``time.monotonic()``, like ``due``.
        due: when to look for the reply next.
        looks: how often it was looked for in vain.
    """

    correlation_id: UUID
    until: float
    due: float = 0.0
    looks: int = 0
    future: Future[Any] = field(default_factory=Future)

    def resolve(self, outcome: Any) -> None:
        with suppress(InvalidStateError):  # cancelled in this very moment
            self.future.set_result(outcome)

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):  # cancelled in this very moment
            self.future.set_exception(error)

    def look_later(self) -> None:
        now = time.monotonic()
        if now > self.until:
            self.future.cancel()
        self.due = now + backoff(self.looks, *LOOK)
        self.looks += 1


def _due(wait: _Wait) -> float:
    return wait.due


class ReplyWatcher:
    """Resolves a future for each durable reply that is awaited. For any thread; fork-safe."""

    def __init__(self, engine: Engine, requests: Requests, reading: Reading) -> None:
        self._engine = engine
        self._requests = requests
        self._reading = reading
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        # A forked child has neither the thread nor those who wait.
        self._changed = threading.Condition()
        self._waits: list[_Wait] = []
        self._thread: threading.Thread | None = None

    def look(self, correlation_id: UUID) -> tuple[Any] | None:
        """The outcome in a tuple, read from the database right now; None if there is none yet.

        Raises:
            UnknownRequest: there is no such request.
        """
        with self._engine.connect() as connection:
            stored = self._requests.outcomes(connection, [correlation_id])
        return self._read(correlation_id, stored)

    def watch(self, correlation_id: UUID, timeout: float) -> Future[Any]:
        """A future of the outcome; cancelled soon after *timeout* seconds without one.

        It fails with ``UnknownRequest`` if there is no such request. While the database is away
        the wait goes on; any other error of the database fails it. Cancelling it ends the wait.
        """
        # The caller's own time-out comes first.
        wait = _Wait(correlation_id, until=time.monotonic() + timeout + LOOK[1])
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
                self._look_for(due)
                failures, pause = 0, LOOK[0]  # those who come meanwhile share the next query
            except Exception as error:
                if not self._will_pass(error):
                    for wait in due:
                        wait.fail(error)
                    continue
                log.warning("durable replies cannot be looked for, trying again: %r", error)
                pause = backoff(failures, *OUTAGE_DELAY)
                failures += 1
            time.sleep(pause)

    def _next_due(self) -> Sequence[_Wait]:
        """The waits whose next look is due, as soon as there are any; none once nobody waits."""
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

    def _look_for(self, due: Sequence[_Wait]) -> None:
        ids = {wait.correlation_id for wait in due}
        with self._engine.connect() as connection:
            stored = self._requests.outcomes(connection, ids)
        for wait in due:
            try:
                found = self._read(wait.correlation_id, stored)
            except Exception as error:  # unknown or unreadable: the others still wait
                wait.fail(error)
                continue
            if found is None:
                wait.look_later()
            else:
                wait.resolve(found[0])

    def _read(
        self, correlation_id: UUID, stored: Mapping[UUID, StoredOutcome | None]
    ) -> tuple[Any] | None:
        if correlation_id not in stored:
            raise unknown_request(correlation_id)
        if (outcome := stored[correlation_id]) is None:
            return None
        return (self._reading.outcome_in([str(correlation_id), outcome.decode()])[1],)

    def _will_pass(self, error: Exception) -> bool:
        dialect = self._requests.dialect
        return dialect.is_outage(error) or dialect.is_transient(error)
