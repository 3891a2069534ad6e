"""The plan of a saga: its progress, and the decisions to carry out next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from celery_eda.sagas.definition import Lock, Sleep, Step, SubSaga, Wait
from celery_eda.sagas.record import Kind, Record


class Progress(Enum):
    """The progress of a part."""

    busy = "busy"
    done = "done"
    failed = "failed"


@dataclass(frozen=True)
class SendCommand:
    """Send the command of a step, or the one that compensates it.

    Attributes:
        undo: the record of the step to compensate; None to do the step itself.
    """

    step: Step | SubSaga
    path: str
    attempt: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    delay: float = 0.0
    undo: Record | None = None


@dataclass(frozen=True)
class CancelSubSaga:
    """Cancel a running sub-saga whose result is not needed any more."""

    record: Record


@dataclass(frozen=True)
class TakeLock:
    """Acquire a lock, or queue for it."""

    part: Lock
    path: str
    key: str


@dataclass(frozen=True)
class AwaitSignal:
    """Begin to wait for a signal."""

    part: Wait
    path: str


@dataclass(frozen=True)
class StartTimer:
    """Begin to sleep."""

    part: Sleep
    path: str


@dataclass(frozen=True)
class RecordChoice:
    """Record a choice: a case, the branches taken, one more round, passing the pivot."""

    kind: Kind
    path: str
    value: Any = None


@dataclass(frozen=True)
class StopWaiting:
    """End the wait for a lock, a signal or a timer."""

    record: Record


Decision = (
    SendCommand | CancelSubSaga | TakeLock | AwaitSignal | StartTimer | RecordChoice | StopWaiting
)


@dataclass(frozen=True)
class Plan:
    """The progress of a part, and the next decisions.

    Attributes:
        decisions: to be carried out in this order.
        failure: the reason of a failure that no record explains.
        stuck: the reason why something cannot be compensated, and the record that says so.
        unsettled: True if a branch that is not needed any more is still to be compensated.
    """

    progress: Progress
    decisions: tuple[Decision, ...] = ()
    failure: str | None = None
    stuck: tuple[str, Record] | None = None
    unsettled: bool = False

    @property
    def passes_pivot(self) -> bool:
        """True if this plan passes the point of no return."""
        choices = [each for each in self.decisions if isinstance(each, RecordChoice)]
        return any(each.kind is Kind.pivot for each in choices)

    def followed_by(self, plan: Plan) -> Plan:
        """Combine both plans; the second *plan* determines progress and failure."""
        return Plan(
            progress=plan.progress,
            decisions=self.decisions + plan.decisions,
            failure=plan.failure,
            stuck=plan.stuck or self.stuck,
            unsettled=self.unsettled or plan.unsettled,
        )


DONE = Plan(Progress.done)
BUSY = Plan(Progress.busy)
FAILED = Plan(Progress.failed)
