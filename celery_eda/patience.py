"""While the database is away or busy: the same step again, for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from celery.exceptions import Reject

from celery_eda import redaction
from celery_eda.dialects.base import Dialect
from celery_eda.retry import delays

log = redaction.logger(__name__)

T = TypeVar("T")

#: Seconds between two tries of a transaction that lost against another, or of a database away.
TRANSIENT_DELAY = (0.02, 2.0)


class Transient(Exception):
    """The database was away or busy; the same delivery may well succeed when made again."""


@dataclass(frozen=True)
class TransientErrors:
    """Tells what will pass from what will not, and waits for it.

    Attributes:
        seconds: how long a delivery is made again before the broker gets it back.
    """

    dialect: Dialect
    seconds: float

    def retry(self, step: Callable[[], T], forgive: Callable[[], None]) -> T:
        """Take *step*; while the database is away or busy, take it again.

        Args:
            step: does nothing by halves: it commits, or it leaves nothing.
            forgive: called before giving up on a busy database, where nobody is to blame.

        Raises:
            Reject: the database has been away for too long; the broker shall bring it again.
        """
        give_up = time.monotonic() + self.seconds
        for delay in delays(*TRANSIENT_DELAY):
            try:
                return step()
            except Exception as error:
                if not isinstance(error, Transient) and not self.is_transient(error):
                    raise
                cause = error.__cause__ if isinstance(error, Transient) else error
                if time.monotonic() + delay > give_up:
                    if self._is_busy(cause):
                        forgive()
                    raise Reject(cause, requeue=True) from cause
                log.warning("delivery is made again in %.2f s: %r", delay, cause)
            time.sleep(delay)
        raise AssertionError("delays() has no end")

    def is_transient(self, error: object) -> bool:
        """Whether *error*, or what it came from, is the database's and will pass."""
        return self._is_busy(error) or any(map(self.dialect.is_outage, _causes(error)))

    def _is_busy(self, error: object) -> bool:
        """Whether *error* came from others who were in the way, so that nobody is to blame."""
        return any(map(self.dialect.is_transient, _causes(error)))


def _causes(error: object) -> Iterator[BaseException]:
    """*error*, if it is one, and what it came from."""
    while isinstance(error, BaseException):
        yield error
        error = error.__cause__ or error.__context__
