"""The end of a delivery, recorded: the result for Celery, or the exception for it.

While a delivery is in progress every exception means that its end is not recorded yet. So what a
recorded end raises is a value until the delivery is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from celery.exceptions import Ignore

from celery_eda.core.delivery import Delivery
from celery_eda.inbox import handler
from celery_eda.inbox.handler import HandlerResult
from celery_eda.inbox.store import Outcome, RecordedOutcome


@dataclass(frozen=True)
class Unsuccessful:
    """The end of an attempt without a result.

    Attributes:
        exception: tells Celery how the attempt ended.
    """

    exception: Exception

    def result_or_raise(self) -> Any:
        """No result, ever.

        Raises:
            Exception: the one that Celery is to get.
        """
        raise self.exception


@dataclass(frozen=True)
class Copy:
    """The end of a copy, which is that of the first one."""

    delivery: Delivery
    recorded: RecordedOutcome

    def result_or_raise(self) -> Any:
        """The recorded result.

        Raises:
            Ignore: there is no result.
            Exception: the recorded error, since the worker that should have reported it was lost.
        """
        task, outcome, result = self.delivery.task, self.recorded.outcome, self.recorded.result
        if outcome is Outcome.done:
            return handler.replay_recorded(task, result)
        if outcome is Outcome.dead and self.delivery.redelivered and result is not None:
            raise handler.replay_recorded(task, result)
        raise Ignore(f"this attempt has been recorded as {outcome.value}")


Ending = HandlerResult | Unsuccessful | Copy
