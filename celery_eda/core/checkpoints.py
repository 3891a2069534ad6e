"""The named steps on a message's path, at each of which a test can stop the process.

The table in ``docs/explanation/path.md`` uses the same names. Reaching a step costs one look-up in
an empty dict unless an action is armed.
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
    "drain.passed",
    "drain.taken",
    "delivery.acknowledged",
)

_armed: dict[str, Callable[[], None]] = {}


def arm(step: str, action: Callable[[], None]) -> None:
    """Run *action* in this process each time it reaches *step*.

    Raises:
        ValueError: there is no such step.
    """
    if step not in STEPS:
        raise ValueError(f"{step!r} is no step; the steps are {', '.join(STEPS)}.")
    _armed[step] = action


def reach(step: str) -> None:
    """Run the action armed for *step*, if any."""
    if action := _armed.get(step):
        action()
