"""The presence of a taker on PostgreSQL behind a pooler: a heartbeat in the taker's row.

A pooler neither preserves a session's locks nor forwards notifications. So a thread writes the
time, by the database's clock, into the taker's row, and wakes the taker to poll its queues. A taker
without a heartbeat for longer than its lease counts as dead. This is the least reliable kind of
presence, and the slowest.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from time import monotonic
from uuid import uuid4

from sqlalchemy import Connection, Engine, func, update
from sqlalchemy.exc import SQLAlchemyError

from celery_eda.databases import Tables

log = logging.getLogger(__name__)

#: Seconds between two polls of the queues.
POLL_INTERVAL = 0.25
#: Heartbeats within one lease: some may fail.
BEATS = 5


class Heartbeat:
    """The presence of one taker, which counts as dead *lease* seconds after its last heartbeat.

    The presence ends by itself when no heartbeat could be written for that long, or when another
    taker has reclaimed this one's messages.
    """

    def __init__(self, engine: Engine, tables: Tables, lease: float) -> None:
        self.name = uuid4().hex
        self._engine = engine
        self._table = tables.takers
        self._lease = lease
        self._over = threading.Event()
        self._lost = ""
        self._thread: threading.Thread | None = None
        self._bell, self._bell_sender = os.pipe()
        os.set_blocking(self._bell, False)
        os.set_blocking(self._bell_sender, False)

    def announce(self, connection: Connection, taker: int) -> None:
        is_own = self._table.c.id == taker
        connection.execute(update(self._table).where(is_own).values(lease=self._lease))
        self._thread = threading.Thread(target=self._run, args=(taker,), daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._bell

    def woken(self) -> Mapping[str, int] | None:
        if self._lost:
            raise ConnectionResetError(self._lost)
        with suppress(BlockingIOError):
            os.read(self._bell, 4096)
            return None
        return {}

    def missed(self, connection: Connection) -> bool:
        return False

    def disown(self) -> None:
        for descriptor in (self._bell, self._bell_sender):
            with suppress(OSError):
                os.close(descriptor)

    def end(self) -> None:
        if self._over.is_set():
            return
        self._over.set()
        os.close(self._bell)
        if self._thread is None:
            os.close(self._bell_sender)  # otherwise the thread closes it: it may be about to write

    def _run(self, taker: int) -> None:
        """Write heartbeats and wake the taker, until the end."""
        with suppress(OSError):  # the taker has ended
            self._beat_and_wake(taker)
        os.close(self._bell_sender)

    def _beat_and_wake(self, taker: int) -> None:
        written = monotonic()
        due = written + self._lease / BEATS
        while not self._over.wait(POLL_INTERVAL) and not self._lost:
            if monotonic() >= due:
                due = monotonic() + self._lease / BEATS
                before = monotonic()
                if self._beat(taker):
                    written = before
            if monotonic() > written + self._lease:
                self._lost = f"taker {taker} could write no heartbeat for {self._lease:g} s"
            with suppress(BlockingIOError):
                os.write(self._bell_sender, b".")

    def _beat(self, taker: int) -> bool:
        """Write a heartbeat; False if the database cannot be reached."""
        is_own = self._table.c.id == taker
        now = func.clock_timestamp()
        try:
            with self._engine.begin() as connection:
                rows = connection.execute(update(self._table).where(is_own).values(at=now)).rowcount
        except SQLAlchemyError as error:
            log.warning("taker %s could not write its heartbeat: %s", taker, error)
            return False
        if not rows:
            self._lost = f"other takers have reclaimed the messages of taker {taker}"
        return True
