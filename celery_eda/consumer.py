"""From the broker to the ack: admit, handle, commit; then Celery acknowledges.

The inbox row, the handler's rows and the messages it published are committed together, before
the acknowledgement. A copy that comes later finds the row and takes no effect.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any, TypeVar

from celery import Task
from celery.exceptions import (
    Ignore,
    MaxRetriesExceededError,
    Reject,
    Retry,
    TaskRevokedError,
)
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from celery_eda import checkpoints, context, handling
from celery_eda.attempts import TIME_LIMIT, Attempts
from celery_eda.cursors import Turn
from celery_eda.dead_letters import Reason
from celery_eda.delivery import Delivery
from celery_eda.dialects.base import LostRace
from celery_eda.errors import (
    NoNextAttempt,
    OutOfSequence,
    PublishingForbidden,
    TimeLimit,
    Unwanted,
    WorkersLost,
)
from celery_eda.failures import Failures
from celery_eda.handling import HandlerResult
from celery_eda.identity import VERDICT, Identity
from celery_eda.inbox import Inbox, Outcome, RecordedOutcome
from celery_eda.order import TurnKeeper
from celery_eda.patience import Transient, TransientErrors
from celery_eda.replying import Responder
from celery_eda.retry import Policy
from celery_eda.unit_of_work import UnitsOfWork

log = logging.getLogger(__name__)

T = TypeVar("T")

#: About these no policy is asked: the handler has decided, or it is not to blame.
DECIDED = (
    *(Ignore, Reject, MaxRetriesExceededError),
    *(MemoryError, Transient, LostRace, OutOfSequence, PublishingForbidden, Unwanted),
)


@dataclass(frozen=True)
class Consumer:
    """The consuming side of one service: the idempotent consumer on its own database.

    Attributes:
        max_deliveries: redeliveries without an outcome after which a message is a dead letter.
        policy: what decides on further attempts of tasks without a policy of their own; None for
            no further attempt.
    """

    engine: Engine
    inbox: Inbox
    attempts: Attempts
    units: UnitsOfWork
    turns: TurnKeeper
    failures: Failures
    responder: Responder
    transient_errors: TransientErrors
    max_deliveries: int
    policy: Policy | None = None

    def deliver(self, task: Task, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Let *task* take effect once, however often its message comes.

        Returns:
            The handler's result, or the recorded one if an earlier copy took effect.

        Raises:
            Ignore: an earlier copy ended otherwise; nothing is left to do.
            Retry: the attempt failed, its effects are undone, and the next one is on its way.
            Reject: the broker shall bring it again, because the handler says so or because the
                database has been away for too long; or it is a dead letter that may go.
            Exception: the handler's own, for good; the message is a dead letter.
        """
        checkpoints.reach("delivery.received")
        try:
            delivery = Delivery.of(task)
        except ValueError as error:
            delivery = Delivery.malformed(task)
            self._persist(self.failures.dead_letter, delivery, Reason.malformed, error)
            raise
        if delivery.redelivered:
            self._persist(self._count, delivery)
        return answer(delivery, self._persist(self._attempt, delivery, args, kwargs))

    def _attempt(
        self, delivery: Delivery, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> HandlerResult | RecordedOutcome:
        """One attempt: it takes effect, or its failure is recorded and its effects are undone."""
        try:
            return self._handle_or_hand_on(delivery, args, kwargs)
        except (Ignore, Retry, Transient):
            raise
        except LostRace as error:
            raise Transient from error
        except Unwanted as error:
            self._refuse(delivery, str(error))
            raise Ignore(f"it is {error}") from error
        except MemoryError as error:
            # Celery's main process raises it again and would never acknowledge.
            raise Reject(error, requeue=True) from error
        except Reject as reject:
            if self.transient_errors.is_transient(reject.reason):
                raise Transient from reject.reason
            if not reject.requeue:
                # Redis drops a rejected message (kombu, QoS.reject), so it is recorded first.
                self.failures.dead_letter(delivery, Reason.rejected, reject)
            raise
        except OutOfSequence as error:
            self.failures.dead_letter(delivery, Reason.out_of_sequence, error)
            raise
        except Exception as error:
            if self.transient_errors.is_transient(error):
                raise Transient from error
            reason = Reason.exhausted if delivery.retries else Reason.failed
            self.failures.dead_letter(delivery, reason, error)
            raise

    def _handle_or_hand_on(
        self, delivery: Delivery, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> HandlerResult | RecordedOutcome:
        """Take effect, or leave it to the next attempt, if handler or policy ask for one."""
        try:
            return self._handle(delivery, args, kwargs)
        except Retry as retry:
            if self.transient_errors.is_transient(retry.exc):
                raise Transient from retry.exc
            attempt = context.in_progress.get()
            if attempt is None or attempt.next_attempt is None:
                raise NoNextAttempt(
                    f"{delivery.consumer} raised Retry, but nothing was published that could be "
                    "the next attempt. Say `raise self.retry()` in a task with bind=True."
                ) from retry
            self.failures.hand_on(delivery, attempt.next_attempt)
            raise
        except DECIDED:
            raise
        except Exception as error:
            if self.transient_errors.is_transient(error) or not (
                due := self._next_try(delivery, error)
            ):
                raise
            self.failures.try_again(delivery, due)
            raise Retry(exc=error, when=due) from error

    def _next_try(self, delivery: Delivery, error: Exception) -> datetime | None:
        """When the policy wants the next attempt; None if it gives up, or fails itself."""
        if not (policy := delivery.task.retry_policy or self.policy):
            return None
        try:
            delay = policy(delivery.retries + 1, error)
            if delay is None:
                return None
            return datetime.now(timezone.utc) + timedelta(seconds=max(0.0, float(delay)))
        except Exception:
            log.exception("the retry policy of %s[%s] fails, which gives up", *delivery.names)
            return None

    def _handle(
        self, delivery: Delivery, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> HandlerResult | RecordedOutcome:
        """The last stretch of the road, in one transaction: admit, handle, commit."""
        with self.units.begin(delivery) as unit:
            turn, cursor = self.turns.turn_of(unit)
            if turn is Turn.later:
                return HandlerResult(ignored=self.turns.park(unit))
            message = (unit.connection, delivery.consumer, delivery.identity)
            if handled := self.inbox.admit(*message):
                self.responder.repeat(unit, handled)
                return handled
            if turn is Turn.past:
                return HandlerResult(ignored=self.turns.pass_over(delivery, cursor))
            if verdict := delivery.request.get(VERDICT):
                raise Unwanted(verdict)
            checkpoints.reach("inbox.admitted")
            ending = handling.run(delivery.task, args, kwargs)
            unit.flush()
            self.responder.answer(unit, ending)
            checkpoints.reach("delivery.handled")
            outcome = Outcome.skipped if ending.ignored else Outcome.done
            self.inbox.record(*message, outcome, ending.recorded)
            self.turns.advance(unit, cursor)
            unit.commit()
        checkpoints.reach("delivery.committed")
        unit.outgoing.hand_off()
        return ending

    def _refuse(self, delivery: Delivery, verdict: str) -> None:
        """Bury a message that is expired or revoked; as with Celery, no errback hears of it."""
        delivery.request.errbacks = None
        self.failures.dead_letter(delivery, Reason(verdict), TaskRevokedError(verdict))
        handling.report_revocation(delivery.task, verdict)

    def _count(self, delivery: Delivery) -> None:
        """Count a redelivery on its own; one too many and the message is a dead letter."""
        with self.engine.begin() as connection:
            if self.inbox.find(connection, delivery.consumer, delivery.identity):
                return
            cause = self.attempts.cause(connection, delivery.consumer, delivery.identity)
            lost = self.attempts.count(connection, delivery.consumer, delivery.identity)
        checkpoints.reach("delivery.started")
        if lost > self.max_deliveries and cause == TIME_LIMIT:
            limit = TimeLimit(f"{lost} deliveries had no outcome, the last within its time limit")
            self.failures.dead_letter(delivery, Reason.time_limit, limit)
            raise limit
        if lost > self.max_deliveries:
            error = WorkersLost(f"{lost} deliveries of this message had no outcome")
            self.failures.dead_letter(delivery, Reason.lost_worker, error)
            raise error

    def note_time_limit(self, consumer: str, headers: Mapping[str, Any]) -> None:
        """Note that the delivery in progress of a message ended with its hard time limit.

        It only gives the dead letter, if it comes to that, its reason.
        """
        identity = Identity.of_headers(headers) or Identity.of_foreign(
            headers["id"], headers.get("retries") or 0, headers.get("replaced_task_nesting") or 0
        )
        with suppress(SQLAlchemyError), self.engine.begin() as connection:
            if not self.inbox.find(connection, consumer, identity):
                self.attempts.note(connection, consumer, identity, TIME_LIMIT)

    def _forgive(self, delivery: Delivery) -> None:
        """Forget the redeliveries counted so far: no worker was lost with the next one."""
        with suppress(SQLAlchemyError), self.engine.begin() as connection:
            self.attempts.forget(connection, delivery.consumer, delivery.identity)

    def _persist(self, step: Callable[..., T], delivery: Delivery, *arguments: Any) -> T:
        return self.transient_errors.retry(
            partial(step, delivery, *arguments), forgive=partial(self._forgive, delivery)
        )


def answer(delivery: Delivery, end: HandlerResult | RecordedOutcome) -> Any:
    """What Celery gets to know: of a copy, what came of the message before.

    Raises:
        Ignore: there is no result.
        Exception: the handler's own, once more: the worker that should have told the result
            backend of it was lost.
    """
    task = delivery.task
    if isinstance(end, HandlerResult):
        return end.answer()
    if end.outcome is Outcome.done:
        return handling.replay_recorded(task, end.result)
    if end.outcome is Outcome.dead and delivery.redelivered and end.result is not None:
        raise handling.replay_recorded(task, end.result)
    raise Ignore(f"this attempt has been recorded as {end.outcome.value}")
