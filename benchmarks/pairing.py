"""Runs of several cases, interleaved, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def interleaved(
    cases: Mapping[str, Callable[[], T]], *, rounds: int, warm_ups: int = 1
) -> dict[str, list[T]]:
    """What each case gave in each round; the first *warm_ups* rounds do not count.

    In every round each case runs once, and another one is first: whatever a run leaves behind (a
    checkpoint to write, a cache) does not always fall on the same one.
    """
    names = list(cases)
    given: dict[str, list[T]] = {name: [] for name in names}
    for number in range(-warm_ups, rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            value = cases[name]()
            if number >= 0:
                given[name].append(value)
    return given
