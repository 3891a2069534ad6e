"""Retry policies: the delay before the next attempt, or None to give up.

A policy is any callable that takes the number of attempts made and the exception.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from celery_eda.errors import ConfigurationError

#: Called with the number of attempts made so far and the exception of the last one; returns the
#: seconds to wait before the next one, or None to give up.
Policy = Callable[[int, Exception], float | None]

#: Seconds between two attempts to reach a broker or database that is away: the first, the longest.
OUTAGE_DELAY = (0.1, 5.0)


@dataclass(frozen=True)
class RetryPolicy:
    """Failures to retry, with the number of attempts and the delays.

    Attempts are counted across workers; those made by ``self.retry()`` count too.

    Attributes:
        attempts: in all, the first one included.
        first: seconds before the second attempt; about twice as many before each further one.
        longest: the longest delay in seconds.
        on: exceptions to retry, with their subclasses.
        never: exceptions not to retry, although they are subclasses of one in ``on``.

    Raises:
        ConfigurationError: the numbers make no sense.
    """

    attempts: int = 5
    first: float = 1.0
    longest: float = 300.0
    on: tuple[type[Exception], ...] = (Exception,)
    never: tuple[type[Exception], ...] = ()

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigurationError(
                f"A RetryPolicy has at least 1 attempt, not {self.attempts}: the first one counts."
            )
        if not 0 <= self.first <= self.longest:
            raise ConfigurationError(
                f"The first delay of a RetryPolicy ({self.first} s) must be from 0 s on and no "
                f"longer than the longest ({self.longest} s). Change one of them."
            )

    def __call__(self, attempts: int, error: Exception) -> float | None:
        """Seconds until the next attempt after *attempts* of them; None to give up."""
        if attempts >= self.attempts or isinstance(error, self.never):
            return None
        if not isinstance(error, self.on):
            return None
        return backoff(attempts - 1, self.first, self.longest)


def checked_policy(policy: Policy) -> Policy:
    """*policy*, if it can be called.

    Raises:
        ConfigurationError: *policy* cannot be called, or is a class.
    """
    if not callable(policy) or isinstance(policy, type):
        raise ConfigurationError(
            f"A retry policy is called with a number of attempts and an exception; {policy!r} "
            "cannot be. Give a RetryPolicy(…) or a function."
        )
    return policy


def backoff(attempts: int, first: float, longest: float) -> float:
    """Seconds to wait after *attempts* failures: doubling, bounded, with jitter.

    "Equal jitter": at least half of the delay remains, so that no wait is close to zero
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
    """
    delay: float = min(longest, first * 2.0 ** min(attempts, 62))
    return delay / 2 + random.uniform(0, delay / 2)


def delays(first: float, longest: float) -> Iterator[float]:
    """The delays before the first, second, … repetition, without end."""
    attempts = 0
    while True:
        yield backoff(attempts, first, longest)
        attempts += 1
