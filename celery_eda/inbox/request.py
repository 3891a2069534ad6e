"""A message in the pool of a worker, as Celery's main process sees it.

Celery would acknowledge some messages that were not handled: messages that are expired, revoked or
over their time limit, or whose worker was lost. Here none is acknowledged before its outcome is
recorded.
"""

from __future__ import annotations

from datetime import datetime, timezone
from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from celery import signals
from celery.utils.log import get_logger
from celery.worker import state
from celery.worker.request import Request
from kombu.asynchronous import get_event_loop

from celery_eda.core import checkpoints
from celery_eda.core.identity import ID_HEADER, VERDICT, WAITED, WIRE
from celery_eda.core.message import Wire
from celery_eda.core.service import service_of
from celery_eda.inbox.wiring import Inbox

log = get_logger(__name__)


class DueRequest(Request):
    """Celery's request, which does not wait for its ETA if it was waited for already.

    The outbox has done so, or the database that is the broker, by the clock of the database. The
    clock of this machine may differ.
    """

    @property
    def eta(self) -> datetime | None:
        """The time until which this worker keeps the message."""
        waited = ID_HEADER in self.message.headers or self.message.delivery_info.get(WAITED)
        return None if waited else super().eta


class ReliableRequest(DueRequest):
    """Celery's request, without the paths that would lose the message."""

    def __init__(self, message: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(message, *arguments, **options)
        # Parked messages and dead letters contain the message as it arrived.
        self._request_dict[WIRE] = Wire.of(message)
        # Only this process passes a verdict; a header of that name is not trusted.
        self._request_dict[VERDICT] = None

    def maybe_expire(self) -> bool:
        """True if the message has expired.

        Celery would also add its id to the revoked ones, which would defeat a later redrive.
        """
        return bool(self.expires) and self.expires < datetime.now(
            timezone.utc if self.expires.tzinfo else None
        )

    def revoked(self) -> bool:
        """False, always: for a revoked message Celery would acknowledge and call no handler.

        An expired or revoked message is passed to the pool, marked as such, and becomes a dead
        letter there.
        """
        if self._request_dict[VERDICT] is None:
            super().revoked()
        return False

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """Announce a verdict; a terminated message is redelivered, to become a dead letter."""
        self.send_event("task-revoked", terminated=terminated, signum=signum, expired=expired)
        details = {"terminated": terminated, "signum": signum, "expired": expired}
        signals.task_revoked.send(sender=self.task, request=self._context, **details)
        if not terminated:
            self._request_dict[VERDICT] = reason
            return
        state.task_ready(self)
        self._already_revoked = True
        self.reject(requeue=True)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Have the broker redeliver a message whose handler exceeded its hard time limit.

        Celery would report a failure and acknowledge, although nothing was committed. The
        redelivery is counted; a message that exceeds the limit every time becomes a dead letter.
        """
        if soft:
            super().on_timeout(soft, timeout)
            return
        state.task_ready(self)
        log.error("Hard time limit (%ss) exceeded for %s[%s]", timeout, self.name, self.id)
        consumer = service_of(self._app).wing(Inbox).consumer
        record = partial(consumer.record_time_limit, self.task.name, self._request_dict)
        if call_soon := getattr(get_event_loop(), "call_soon", None):
            # The process still exists, and may hold the only write lock of its database.
            call_soon(record)
        else:  # a greenlet has ended, and the next delivery may come at once
            record()
        self.reject(requeue=True)

    def on_success(self, outcome: Any, **options: Any) -> None:
        """Have the broker redeliver a message whose call ended with what is no ``Exception``.

        A pool without processes passes such an end here as if it were a success.
        """
        if isinstance(outcome, ExceptionInfo):
            self.on_failure(outcome)
        else:
            super().on_success(outcome, **options)

    def _success_was_stored(self) -> bool:
        """False, always: Celery would acknowledge a lost worker's message once its result exists.

        The steps after the result, such as the message's part in a chord, would then never be
        done; a redelivery does them.
        """
        return False

    def acknowledge(self) -> None:
        super().acknowledge()
        checkpoints.reach("delivery.acknowledged")
