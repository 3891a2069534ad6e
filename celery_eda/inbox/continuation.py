"""Continuations: what to do after a failed attempt at a message, as values.

:func:`classify` decides, and the consumer executes: it alone records, sends and raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from celery.exceptions import Ignore, MaxRetriesExceededError, Reject, Retry

from celery_eda.core import redaction
from celery_eda.core.delivery import Delivery
from celery_eda.core.interruption import exceptions_only
from celery_eda.core.message import Message
from celery_eda.core.retry import Policy
from celery_eda.databases import LostRace
from celery_eda.dead_letters import Reason
from celery_eda.errors import (
    NoNextAttempt,
    OutOfSequence,
    PublishingForbidden,
    RemoteError,
    TimeLimit,
    TransactionTimeout,
    Unwanted,
    WorkersLost,
)
from celery_eda.inbox.attempts import IDLE, TIME_LIMIT
from celery_eda.inbox.transient import Transient, TransientErrors

log = redaction.logger(__name__)

_GIVEN_UP = (MaxRetriesExceededError, PublishingForbidden)


@dataclass(frozen=True)
class NextAttempt:
    """Send the next attempt, which the handler has published by ``self.retry()``."""

    message: Message


@dataclass(frozen=True)
class TryAgain:
    """Send the same message again at *due*, because the retry policy says so."""

    due: datetime


@dataclass(frozen=True)
class RunAgain:
    """Repeat the delivery in this process: the database was busy or away."""

    cause: BaseException


@dataclass(frozen=True)
class Requeue:
    """Have the broker redeliver the message."""


@dataclass(frozen=True)
class Refuse:
    """Dead-letter a message that is ``expired`` or ``revoked``, as *verdict* says, unhandled."""

    verdict: str


@dataclass(frozen=True)
class Dead:
    """Dead-letter the message, which has failed for good with *error*."""

    reason: Reason
    error: Exception


@dataclass(frozen=True)
class Done:
    """Do nothing: the exception alone makes Celery do the right thing."""


Continuation = NextAttempt | TryAgain | RunAgain | Requeue | Refuse | Dead | Done


def classify(
    delivery: Delivery,
    error: Exception,
    transient_errors: TransientErrors,
    *,
    policy: Policy | None = None,
    next_attempt: Message | None = None,
    of_handler: bool = False,
) -> Continuation:
    """Decide what follows an attempt that ended with *error*.

    Args:
        delivery: the attempt; its effects have been rolled back.
        error: raised by the handler, by its transaction, or while its end was being recorded.
        transient_errors: the errors after which the same delivery may well succeed.
        policy: decides about errors of the handler; None for no further attempt.
        next_attempt: the retry that the handler has published.
        of_handler: True if the handler raised *error*. An error of this package is then one like
            any other: it may have come with a reply, from anybody.
    """
    match error:
        case Retry() if transient_errors.includes(error.exc):
            return RunAgain(error.exc)
        case Retry() if next_attempt:
            return NextAttempt(next_attempt)
        case Retry():
            return classify(delivery, _no_next_attempt(delivery, error), transient_errors)
        case Ignore() | Transient():
            return Done()
        case LostRace():
            return RunAgain(error)
        case Unwanted() if not of_handler:
            return Refuse(str(error))
        case MemoryError():
            # Celery's main process would raise it again and never acknowledge the message.
            return Requeue()
        case Reject() if transient_errors.includes(error.reason):
            return RunAgain(error.reason)
        case Reject() if error.requeue:
            return Done()
        case Reject():
            # Redis drops a rejected message (kombu, QoS.reject), so a dead letter keeps it.
            return Dead(Reason.rejected, error)
        case OutOfSequence() if not of_handler:
            return Dead(Reason.out_of_sequence, error)
    if transient_errors.includes(error):
        return RunAgain(error)
    if policy and (due := _due(delivery, error, policy)):
        return TryAgain(due)
    return Dead(Reason.exhausted if delivery.retries else Reason.failed, error)


def lost(deliveries: int, cause: str | None, transaction_timeout: float) -> Dead:
    """The end of a message that has had too many *deliveries* without an outcome."""
    if cause == IDLE:
        stalled = (
            f"{deliveries} deliveries had no outcome: the database ended the last transaction, "
            f"which had been idle for longer than eda_transaction_timeout ({transaction_timeout:g} "
            "s), or than the database itself allows. Raise it, or let the task do what takes long "
            "before it uses the database, or in a task of its own; then redrive the message."
        )
        return Dead(Reason.time_limit, TransactionTimeout(stalled))
    if cause == TIME_LIMIT:
        overrun = f"{deliveries} deliveries had no outcome, the last within its time limit"
        return Dead(Reason.time_limit, TimeLimit(overrun))
    killed = f"{deliveries} deliveries of this message had no outcome"
    return Dead(Reason.lost_worker, WorkersLost(killed))


def _due(delivery: Delivery, error: Exception, policy: Policy) -> datetime | None:
    """The time of the next attempt; None if the policy gives up, or fails itself."""
    if isinstance(error, _GIVEN_UP) and not isinstance(error.__cause__, RemoteError):
        return None  # the handler has given up; nothing would change
    try:
        with exceptions_only():
            delay = policy(delivery.retries + 1, error)
        if delay is None:
            return None
        return datetime.now(timezone.utc) + timedelta(seconds=max(0.0, float(delay)))
    except Exception:
        log.exception("no further attempt at %s: its retry policy failed", delivery.log_name)
        return None


def _no_next_attempt(delivery: Delivery, retry: Retry) -> NoNextAttempt:
    error = NoNextAttempt(
        f"{delivery.consumer} raised Retry, but nothing was published that could be "
        "the next attempt. Use `raise self.retry()` in a task with bind=True."
    )
    error.__cause__ = retry
    return error.with_traceback(retry.__traceback__)
