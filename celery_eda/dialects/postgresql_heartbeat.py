"""A taker on PostgreSQL behind a pooler: it is there for as long as it says so.

A pooler keeps no lock for a session and passes no wake-up on. So a thread writes the time by the
database's clock into the taker's row, and has it look into its queues. Whoever is silent for
longer than its lease is taken for gone: the least sure kind of presence, and the slowest.
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

from celery_eda.tables import Tables

log = logging.getLogger(__name__)

#: Seconds between two looks into the queues.
LOOK = 0.25
#: How often it says so within the lease: some may fail.
BEATS = 5


class Beating:
    """One taker; *lease* are the seconds after which it is taken for gone.

    It gives up itself when it could not say so for that long, or finds that others have buried it.
    """

    def __init__(self, engine: Engine, tables: Tables, lease: float) -> None:
        self.name = uuid4().hex
        self._engine = engine
        self._table = tables.takers
        self._lease = lease
        self._over = threading.Event()
        self._lost = ""
        self._thread: threading.Thread | None = None
        self._bell, self._ringer = os.pipe()
        os.set_blocking(self._bell, False)
        os.set_blocking(self._ringer, False)

    def announce(self, connection: Connection, taker: int) -> None:
        here = self._table.c.id == taker
        connection.execute(update(self._table).where(here).values(lease=self._lease))
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
        for descriptor in (self._bell, self._ringer):
            with suppress(OSError):
                os.close(descriptor)

    def end(self) -> None:
        if self._over.is_set():
            return
        self._over.set()
        os.close(self._bell)
        if self._thread is None:
            os.close(self._ringer)  # else it is the thread's: it may be about to write

    def _run(self, taker: int) -> None:
        """Say that it is there and look, until the end."""
        with suppress(OSError):  # nobody listens any more
            self._beat_and_ring(taker)
        os.close(self._ringer)

    def _beat_and_ring(self, taker: int) -> None:
        said = monotonic()
        due = said + self._lease / BEATS
        while not self._over.wait(LOOK) and not self._lost:
            if monotonic() >= due:
                due = monotonic() + self._lease / BEATS
                before = monotonic()
                if self._beat(taker):
                    said = before
            if monotonic() > said + self._lease:
                self._lost = f"nothing was heard of taker {taker} for {self._lease:g} s"
            with suppress(BlockingIOError):
                os.write(self._ringer, b".")

    def _beat(self, taker: int) -> bool:
        """Write down that it is there; False if the database is away."""
        here = self._table.c.id == taker
        now = func.clock_timestamp()
        try:
            with self._engine.begin() as connection:
                rows = connection.execute(update(self._table).where(here).values(at=now)).rowcount
        except SQLAlchemyError as error:
            log.warning("taker %s cannot say that it is there: %s", taker, error)
            return False
        if not rows:
            self._lost = f"others have taken taker {taker} for gone"
        return True
