"""Waiting for a condition, with a bound that only something broken reaches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

#: Seconds until a test gives up; on a busy machine a process may take twenty to start.
BOUND = 120.0


def eventually(condition: Callable[[], Any], what: str = "", within: float = BOUND) -> Any:
    """Wait until *condition* is true; returns what it gave.

    Raises:
        AssertionError: it was not *within* so many seconds.
    """
    deadline = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not in {within:g} s: {what or condition}"
        time.sleep(0.01)
    return found
