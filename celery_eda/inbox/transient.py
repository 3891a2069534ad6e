"""Errors after which the same delivery may well succeed: the database was busy or away.

The step that failed is repeated here, with growing pauses, before the message is requeued.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from celery.exceptions import Reject

from celery_eda.core import redaction
from celery_eda.core.retry import delays
from celery_eda.databases import Dialect

log = redaction.logger(__name__)

T = TypeVar("T")

#: Seconds between two tries, the first and the longest.
TRANSIENT_DELAY = (0.02, 2.0)


class Transient(Exception):
    """The database was busy or away, as ``__cause__`` says; the step may be repeated."""


class Stalled(Exception):
    """The database ended a transaction that was idle for too long, as ``__cause__`` says.

    The step is not repeated here: it took long, and is likely to stall again.
    """


@dataclass(frozen=True)
class TransientErrors:
    """Recognizes transient errors of one database, and repeats steps that failed with one.

    Attributes:
        seconds: how long a step is repeated before the message is requeued.
    """

    dialect: Dialect
    seconds: float

    def retry(self, step: Callable[[], T], forgive: Callable[[], None]) -> T:
        """Run *step*; run it again for as long as it fails with a transient error.

        Args:
            step: commits, or has no effect.
            forgive: called before giving up on a busy database, which is no fault of the message.

        Raises:
            Reject: the time is up; the broker is to redeliver the message.
            Stalled: the database ended the transaction of the step.
        """
        deadline = time.monotonic() + self.seconds
        for delay in delays(*TRANSIENT_DELAY):
            try:
                return step()
            except Exception as error:
                if isinstance(error, Stalled):
                    raise
                if not isinstance(error, Transient) and not self.includes(error):
                    raise
                cause = error.__cause__ if isinstance(error, Transient) else error
                if time.monotonic() + delay > deadline:
                    if self._is_busy(cause):
                        forgive()
                    raise Reject(cause, requeue=True) from cause
                log.warning("delivery is repeated in %.2f s: %r", delay, cause)
            time.sleep(delay)
        raise AssertionError("delays() has no end")

    def includes(self, error: object) -> bool:
        """True if *error*, or an error that it came from, is a transient one."""
        return self._is_busy(error) or any(map(self.dialect.is_outage, causes_of(error)))

    def _is_busy(self, error: object) -> bool:
        """True if another transaction was in the way, so that the message is not to blame."""
        return any(map(self.dialect.is_transient, causes_of(error)))


def causes_of(error: object) -> Iterator[BaseException]:
    """*error*, if it is an exception, and those that it came from, which may form a circle."""
    seen: set[int] = set()
    while isinstance(error, BaseException) and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__context__ if error.__cause__ is None else error.__cause__
