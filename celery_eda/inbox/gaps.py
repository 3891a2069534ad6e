"""Chores of housekeeping for keys that wait for a message which does not come."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field

from sqlalchemy import Connection

from celery_eda.core import redaction
from celery_eda.databases import LostRace
from celery_eda.ordering import Gaps, Progress, WaitingKey
from celery_eda.outbox import OutboxStore

log = redaction.logger(__name__)

#: Waiting keys that a warning names.
EXAMPLES = 5


@dataclass(frozen=True)
class GivenUpMessages:
    """Lets keys go on whose restored producer has begun a new epoch.

    The messages that are parked already take effect first, then those of the new epoch. A chore of
    housekeeping; see :class:`celery_eda.databases.Chore`.
    """

    gaps: Gaps
    outbox: OutboxStore
    what: str = "skipped"
    is_due: bool = True

    def step(self, connection: Connection, limit: int) -> int:
        messages = []
        for key in self.gaps.given_up(connection, limit):
            with suppress(LostRace):  # the key goes on by itself
                messages.append(self.gaps.skip(connection, key))
                log.warning(
                    "%s goes on without %s: its producer was restored and has begun a new epoch",
                    key.name,
                    key.gap,
                )
        if messages:
            self.outbox.add(connection, messages)
        return len(messages)


@dataclass
class OverdueKeys:
    """Warns of keys that wait for a message which may be lost.

    A chore of housekeeping. It warns once in *seconds*.

    Attributes:
        seconds: how long a key has to wait.
    """

    progress: Progress
    seconds: float
    what: str = "overdue"
    is_due: bool = True
    _quiet_until: float = field(default=0.0, init=False)

    def step(self, connection: Connection, limit: int) -> int:
        if time.monotonic() < self._quiet_until:
            return 0
        keys = self.progress.waiting(connection, limit, seconds=self.seconds, is_held=False)
        if keys:
            self._quiet_until = time.monotonic() + self.seconds
            log.warning(
                "keys have waited for more than %g s for missing messages (%s keys, e.g. %s). "
                "The messages are in a queue, wait for a retry, or are lost. See `eda order list`; "
                "if they are lost, run `eda order skip-gap`.",
                self.seconds,
                len(keys) if len(keys) < limit else f"{limit} or more",
                "; ".join(map(_line, keys[:EXAMPLES])),
            )
        return 0


def _line(key: WaitingKey) -> str:
    return f"{key.name} for {key.gap} since {key.since:%Y-%m-%d %H:%M:%S} UTC"
