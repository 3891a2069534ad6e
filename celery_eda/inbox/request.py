"""A message in the pool of a worker, as Celery's main process sees it.

Celery would acknowledge some messages that were not handled: messages that are expired, revoked or
over their time limit, or whose worker was lost. Here none is acknowledged before its outcome is
recorded, nor while parked messages follow it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
from celery_eda.core.identity import DRAIN, ID_HEADER, ORDER_HEADER, VERDICT, WAITED, WIRE
from celery_eda.core.message import Wire
from celery_eda.core.service import service_of
from celery_eda.inbox.drain import Drain, Followed, Successor, traced
from celery_eda.inbox.local_delivery import LocalDelivery, ParkedMessage
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
    """Celery's request, without the paths that would lose the message.

    Attributes:
        successor: the parked message that is next, once this one has ended.
    """

    acknowledged: bool
    successor: Successor | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Celery derives a class for each task (create_request_cls), with faster versions of these
        # methods, which would pass by ours.
        if cls.__module__ == Request.__module__:
            for name in ("execute_using_pool", "on_success"):
                delattr(cls, name)

    def __init__(self, message: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(message, *arguments, **options)
        # Parked messages and dead letters contain the message as it arrived.
        self._request_dict[WIRE] = Wire.of(message)
        # Only this process passes a verdict and a drain; headers of those names are not trusted.
        self._request_dict[VERDICT] = self._request_dict[DRAIN] = None
        inbox = service_of(self._app).wing(Inbox)
        self.local_delivery: LocalDelivery | None = inbox.local_delivery
        if isinstance(message, ParkedMessage):
            self._request_dict[DRAIN] = message.drain
        elif self.local_delivery and ORDER_HEADER in self._request_dict:
            self._request_dict[DRAIN] = Drain(seconds=inbox.longest_drain)

    def execute_using_pool(self, pool: Any, **options: Any) -> Any:
        """Give the message to *pool*; at its end the pool also returns the parked one that is next.

        Raises:
            TaskRevokedError: never for a message of this class; see :meth:`revoked`.
        """
        if self._request_dict[DRAIN] is not None:
            pool = DrainingPool(pool, self)
        return super().execute_using_pool(pool, **options)

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
        """Acknowledge the message, or have the parked message that is next do so at its end."""
        if self.acknowledged or self.successor is None:
            super().acknowledge()
            checkpoints.reach("delivery.acknowledged")
        elif self.local_delivery and self.local_delivery.deliver(self.message, self.successor):
            self.acknowledged = True
        else:
            # The copy has no effect, and passes on the same parked message.
            self.reject(requeue=True)


@dataclass(frozen=True)
class DrainingPool:
    """The pool of a worker; with the end of a message it returns the parked one that is next."""

    pool: Any
    request: ReliableRequest

    def apply_async(
        self, trace: Any, args: Any, callback: Callable[[Any], Any], **options: Any
    ) -> Any:
        """Run a message in the pool, as its own method does."""
        callback = partial(self._on_end, callback)
        return self.pool.apply_async(traced, args=(trace, *args), callback=callback, **options)

    def _on_end(self, callback: Callable[[Any], Any], end: Any, **options: Any) -> None:
        if isinstance(end, Followed):
            self.request.successor, end = end.successor, end.outcome
        callback(end, **options)
