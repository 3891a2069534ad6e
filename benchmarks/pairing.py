"""Interleaved runs of several cases, so that a disturbance of the machine affects all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def interleaved(
    cases: Mapping[str, Callable[[], T]], *, rounds: int, warm_ups: int = 1
) -> dict[str, list[T]]:
    """The results of each case by round; the first *warm_ups* rounds are dropped.

    In every round each case runs once, and the order rotates: the after-effects of a run (a
    checkpoint to write, a cache) do not always hit the same case.
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
