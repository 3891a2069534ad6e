"""How long to wait before trying again."""

from __future__ import annotations

import random
from collections.abc import Iterator


def backoff(attempts: int, first: float, longest: float) -> float:
    """Seconds to wait after *attempts* failures: doubling, bounded, with jitter.

    "Equal jitter": at least half of the delay is kept, so that a short first delay stays one
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
