"""The named steps of the road, so that a test can stop a process at exactly one of them.

The names are those of the guarantees table in the README. Reaching a step costs one look-up
in an empty dict unless somebody armed it.
"""

from __future__ import annotations

from collections.abc import Callable

STEPS = (
    "publish.captured",
    "outbox.written",
    "publish.committed",
    "relay.claimed",
    "relay.published",
    "relay.confirmed",
    "relay.cleared",
    "delivery.received",
    "delivery.started",
    "inbox.admitted",
    "delivery.handled",
    "delivery.committed",
    "delivery.acknowledged",
)

_armed: dict[str, Callable[[], None]] = {}


def arm(step: str, action: Callable[[], None]) -> None:
    """Run *action* in this process each time it reaches *step*.

    Raises:
        ValueError: *step* is no step of the road.
    """
    if step not in STEPS:
        raise ValueError(f"{step!r} is no step of the road; the steps are {', '.join(STEPS)}")
    _armed[step] = action


def disarm() -> None:
    """Forget every armed step."""
    _armed.clear()


def reach(step: str) -> None:
    """Say that this process has come to *step*."""
    if action := _armed.get(step):
        action()
