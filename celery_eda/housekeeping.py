"""What nobody needs any more is deleted, and what was left lying is sent on its way.

Each batch is a short transaction of its own, of the oldest rows first, so that nobody waits for
it. Ages are those by the database's clock. How long what is kept, and why that is long enough, is
the rule in :meth:`celery_eda.settings.Settings.check_retention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Table, and_, exists, select

from celery_eda.cursors import Cursors
from celery_eda.dialects.base import Dialect
from celery_eda.outbox import OutboxStore
from celery_eda.saga_log import SagaStore
from celery_eda.settings import DAY, Settings
from celery_eda.tables import Tables

#: Rows that one transaction deletes.
BATCH = 500
#: Seconds. No row is older, and dates begin with the year 1.
LONGEST_AGE = 36500 * DAY
#: State of a dead letter that nobody has dealt with.
OPEN = "open"


@dataclass(frozen=True)
class Batch:
    """What one transaction did: how many *rows*, and what they are."""

    what: str
    rows: int


@dataclass(frozen=True)
class Housekeeping:
    """Keeps the tables of one service small. Any number of them may work side by side."""

    engine: Engine
    dialect: Dialect
    tables: Tables
    outbox: OutboxStore
    cursors: Cursors
    sagas: SagaStore
    settings: Settings

    def batches(self) -> Iterator[Batch]:
        """Do what there is to do, one transaction each time that the next batch is asked for."""
        for what, step in self._steps():
            rows = BATCH
            while rows == BATCH:
                rows = step()
                yield Batch(what, rows)

    def finish(self) -> dict[str, int]:
        """Do all there is to do; returns the number of rows by what they are."""
        counts = {what: 0 for what, _ in self._steps()}
        for batch in self.batches():
            counts[batch.what] += batch.rows
        return counts

    def _steps(self) -> Iterator[tuple[str, Callable[[], int]]]:
        """What is done, in this order: a dead letter that goes no longer protects its inbox row."""
        settings, tables = self.settings, self.tables
        yield "released", self._release
        for what, table, seconds, unneeded in (
            ("dead_letters", tables.dead_letters, settings.dead_letter_retention, self._closed),
            ("inbox", tables.inbox, settings.inbox_retention, self._forgettable),
            ("attempts", tables.attempts, settings.inbox_retention, self._old_attempts),
            ("requests", tables.requests, settings.request_retention, self._old_requests),
            ("audit", tables.audit, settings.audit_retention, self._orphaned),
        ):
            if seconds is not None:
                yield what, partial(self._purge, table, seconds, unneeded)
        if settings.saga_retention is not None:
            yield "sagas", partial(self._end_sagas, settings.saga_retention)

    def _release(self) -> int:
        """Send parked messages again whose turn has come and that nobody has seen since."""
        with self.engine.begin() as connection:
            messages = self.cursors.sweep(connection, self.settings.transaction_timeout, BATCH)
            if messages:
                self.outbox.add(connection, messages)
        return len(messages)

    def _purge(
        self, table: Table, seconds: float, unneeded: Callable[[Any], ColumnElement[bool]]
    ) -> int:
        with self.engine.begin() as connection:
            before = self._before(connection, seconds)
            old = and_(table.c.at < before, unneeded(before))
            return self.dialect.purge(connection, table, old, BATCH)

    def _end_sagas(self, seconds: float) -> int:
        with self.engine.begin() as connection:
            return self.sagas.purge(connection, self._before(connection, seconds), BATCH)

    def _before(self, connection: Connection, seconds: float) -> datetime:
        """So long ago, as a value: compared with a function, no index would be used."""
        now: datetime = connection.execute(select(self.dialect.now())).scalar_one()
        return now - timedelta(seconds=min(seconds, LONGEST_AGE))

    # ── what may go ─────────────────────────────────────────────────────────────────────────

    def _closed(self, before: datetime) -> ColumnElement[bool]:
        """Dead letters that are dealt with, and with which nothing was done since."""
        letters, audit = self.tables.dead_letters.c, self.tables.audit.c
        touched = exists().where(audit.dead_letter == letters.id, audit.at >= before)
        return and_(letters.state != OPEN, ~touched)

    def _forgettable(self, before: datetime) -> ColumnElement[bool]:
        """Inbox rows of messages that are nowhere here any more."""
        message_id = self.tables.inbox.c.message_id
        dead, parked, outbox = (
            self.tables.dead_letters.c, self.tables.parked.c, self.tables.outbox.c
        )  # fmt: skip
        # The outbox has no index on it; what is younger than the inbox row cannot be its message.
        waiting = select(outbox.message_id).where(outbox.created_at < before)
        return and_(
            ~exists().where(dead.message_id == message_id),
            ~exists().where(parked.message_id == message_id),
            message_id.not_in(waiting),
        )

    def _old_attempts(self, before: datetime) -> ColumnElement[bool]:
        """Counts of redeliveries that were never followed by an outcome."""
        return self.tables.attempts.c.at < before

    def _old_requests(self, before: datetime) -> ColumnElement[bool]:
        return self.tables.requests.c.at < before

    def _orphaned(self, before: datetime) -> ColumnElement[bool]:
        """Audit of dead letters that are gone."""
        audit, letters = self.tables.audit.c, self.tables.dead_letters.c
        return ~exists().where(letters.id == audit.dead_letter)
