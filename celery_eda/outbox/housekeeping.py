"""Deletes rows that are past their retention, and sends released messages that were left behind.

Each batch is a short transaction of its own, with the oldest rows first, so that no other
transaction waits long for it. ``Settings.check_retention`` says why the retentions are long
enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import Engine

from celery_eda.core import redaction
from celery_eda.databases import Chore
from celery_eda.outbox.store import OutboxStore

log = redaction.logger(__name__)

#: Rows that one transaction treats.
BATCH = 500


class Retained(Protocol):
    """A wing with rows that may be deleted some day."""

    def retention(self) -> Sequence[Chore]:
        """The rules of its stores, in the order in which housekeeping applies them."""
        ...


@dataclass(frozen=True)
class Swept:
    """The number of *rows* that one transaction treated, and the name for them."""

    what: str
    rows: int


class Round:
    """One round of housekeeping, done step by step."""

    def __init__(self, steps: Iterator[Swept]) -> None:
        self._steps = steps

    def step(self) -> bool:
        """Treat one batch, in a transaction of its own; False if nothing was left to do."""
        return next(self._steps, None) is not None


@dataclass(frozen=True)
class Housekeeping:
    """Keeps the tables of one service small. Any number of them may work side by side.

    Attributes:
        chores: done in this order. Dead letters are deleted before the rows of the inbox, which
            they protect.
    """

    engine: Engine
    chores: Sequence[Chore]

    def start(self) -> Round:
        """A new round."""
        return Round(self.batches())

    def batches(self) -> Iterator[Swept]:
        """Do all chores, with one transaction for each batch that the caller asks for."""
        for chore in self._due():
            rows = BATCH
            while rows == BATCH:
                with self.engine.begin() as connection:
                    rows = chore.step(connection, BATCH)
                yield Swept(chore.what, rows)

    def finish(self) -> dict[str, int]:
        """Do all chores; returns the numbers of rows by name."""
        counts = {chore.what: 0 for chore in self._due()}
        for swept in self.batches():
            counts[swept.what] += swept.rows
        return counts

    def _due(self) -> list[Chore]:
        return [each for each in self.chores if each.is_due]


def warn_of_abandoned(engine: Engine, outbox: OutboxStore) -> None:
    """Warn of messages of other services in *outbox*, which its relays must not send."""
    with engine.connect() as connection:
        for service in outbox.abandoned(connection):
            log.warning(
                "messages of the service %r wait in the outbox of %r, and no relay sends them. "
                "If both are one service, give their apps the same eda_service; otherwise run "
                "`celery -A <its app> eda relay`.",
                service,
                outbox.service,
            )
