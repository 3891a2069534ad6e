"""The drain of an ordering key: its parked messages are handled one after the other.

A message that has taken effect passes its parked successor to the worker's main process, which
gives it to the pool like a message from the broker: with a request, time limits, events, a result
and a transaction of its own. The broker's delivery of the first message stays open meanwhile, and
is acknowledged after the last one. If a process dies in between, the broker redelivers the first
message; its copy has no effect, and passes on the successor whose turn it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from celery_eda.core import checkpoints
from celery_eda.core.identity import DRAIN
from celery_eda.core.message import Message

#: Parked messages that follow one message at most; the next one is sent again by the outbox.
MOST = 50
#: Seconds from the start of a message after which none follows it any more.
LONGEST = 60.0
#: The part of the broker's visibility timeout that a drain may take.
PART_OF_VISIBILITY = 0.25


@dataclass
class Drain:
    """The parked messages that may still follow under one delivery of the broker.

    Attributes:
        left: their number.
        seconds: the time for all of them, from the start of the first message.
        until: the end of that time by this machine's clock; None before the start.
        successor: passed on by the message that has this drain; None for none.
    """

    left: int = MOST
    seconds: float = LONGEST
    until: float | None = None
    successor: Successor | None = None

    def start(self) -> None:
        """Begin to count the seconds, unless an earlier message has."""
        if self.until is None:
            self.until = monotonic() + self.seconds

    @property
    def may_go_on(self) -> bool:
        """True if another message may follow."""
        return self.left > 0 and self.until is not None and monotonic() < self.until

    def pass_on(self, message: Message, *, redelivered: bool) -> None:
        """Have the worker handle the parked *message* next.

        Args:
            message: the one whose turn it is, by what has been committed.
            redelivered: True if an earlier delivery of it may have had no outcome.
        """
        rest = Drain(self.left - 1, self.seconds, self.until)
        self.successor = Successor(message, redelivered, rest)


@dataclass(frozen=True)
class Successor:
    """A parked message whose turn has come.

    Attributes:
        redelivered: True if an earlier delivery of it may have had no outcome.
        drain: the parked messages that may follow this one.
    """

    message: Message
    redelivered: bool
    drain: Drain


@dataclass(frozen=True)
class Followed:
    """The end of a task, as Celery returns it to the main process, and the message that is next."""

    outcome: Any
    successor: Successor


def longest_drain(visibility_timeout: float | None) -> float:
    """Seconds for a drain, after which the broker must not redeliver the first message yet."""
    if visibility_timeout is None:
        return LONGEST
    return min(LONGEST, PART_OF_VISIBILITY * visibility_timeout)


def traced(trace: Callable[..., Any], task: str, uuid: str, request: Any, *rest: Any) -> Any:
    """The end of a task as Celery's *trace* returns it, with the parked message that is next."""
    drain: Drain = request[DRAIN]
    drain.start()
    outcome = trace(task, uuid, request, *rest)
    if drain.successor is None:
        return outcome
    checkpoints.reach("drain.passed")
    return Followed(outcome, drain.successor)
