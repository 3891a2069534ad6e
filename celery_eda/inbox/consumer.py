"""The delivery of a message to a reliable task: admit, handle, commit; then Celery acknowledges.

The inbox row, the handler's rows and the messages it published are committed together, before
the acknowledgement. A copy that arrives later finds the inbox row and has no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from celery import Task
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded, TaskRevokedError
from sqlalchemy import Engine
from sqlalchemy.exc import InternalError, OperationalError, ProgrammingError, SQLAlchemyError

from celery_eda.core import checkpoints, context, redaction
from celery_eda.core.delivery import Delivery
from celery_eda.core.error_text import presentable
from celery_eda.core.identity import VERDICT, WIRE, Identity
from celery_eda.core.interruption import exceptions_only
from celery_eda.core.message import Message
from celery_eda.core.retry import Policy
from celery_eda.dead_letters import Reason
from celery_eda.errors import OutOfSequence, Unwanted
from celery_eda.inbox import handler
from celery_eda.inbox.attempts import IDLE, MOST_STALLS, TIME_LIMIT, Attempts
from celery_eda.inbox.continuation import (
    Continuation,
    Dead,
    Done,
    NextAttempt,
    Refuse,
    Requeue,
    RunAgain,
    TryAgain,
    classify,
    lost,
)
from celery_eda.inbox.ending import Copy, Ending, Unsuccessful
from celery_eda.inbox.failures import Failures, again
from celery_eda.inbox.handler import HandlerResult
from celery_eda.inbox.ordering import TurnKeeper
from celery_eda.inbox.store import InboxStore, Outcome, RecordedOutcome
from celery_eda.inbox.transient import Stalled, Transient, TransientErrors
from celery_eda.inbox.unit_of_work import UnitOfWork, UnitsOfWork
from celery_eda.ordering import Turn
from celery_eda.requests import Responder

log = redaction.logger(__name__)

T = TypeVar("T")

#: Errors that do not depend on the message, unless its handler raises them.
UNRELATED = (InternalError, OperationalError, ProgrammingError, SoftTimeLimitExceeded)


@dataclass(frozen=True)
class Consumer:
    """The consuming side of one service: an idempotent consumer on the service's own database.

    Attributes:
        max_deliveries: redeliveries without an outcome after which a message is a dead letter.
        transaction_timeout: seconds after which the database ends an idle transaction.
        policy: decides on further attempts of tasks without a policy of their own; None for no
            further attempt.
    """

    engine: Engine
    inbox: InboxStore
    attempts: Attempts
    units: UnitsOfWork
    turns: TurnKeeper
    failures: Failures
    responder: Responder
    transient_errors: TransientErrors
    max_deliveries: int
    transaction_timeout: float
    policy: Policy | None = None

    def deliver(self, task: Task, args: Sequence[Any], kwargs: dict[str, Any]) -> Ending:
        """Handle the message that *task* is called for; it takes effect once, despite copies.

        Returns:
            The recorded end: the handler's result; that of an earlier copy; ``Retry``, after which
            the next attempt is in the outbox; or the handler's error, with a dead letter.

        Raises:
            Exception: no end is recorded, so the broker has to redeliver the message.
        """
        checkpoints.reach("delivery.received")
        try:
            delivery = Delivery.of(task)
        except ValueError as error:
            delivery, malformed = Delivery.malformed(task), Dead(Reason.malformed, error)
            return self._despite_outages(delivery, self._conclude, error, malformed)
        if delivery.redelivered and (end := self._despite_outages(delivery, self._count)):
            return end
        try:
            return self._despite_outages(delivery, self._attempt, args, kwargs)
        except Stalled as stalled:
            self._record_cause(delivery.consumer, delivery.identity, IDLE)
            log.error(
                "%s was idle too long, and is redelivered: %r", delivery.log_name, stalled.__cause__
            )
            raise Reject(repr(stalled.__cause__), requeue=True) from stalled

    def _attempt(self, delivery: Delivery, args: Sequence[Any], kwargs: dict[str, Any]) -> Ending:
        """Make one attempt: it takes effect, or it is rolled back and what follows is recorded."""
        try:
            return self._handle(delivery, args, kwargs)
        except (Transient, Stalled):
            raise
        except Exception as error:
            progress = context.in_progress.get()
            if progress is None or progress.delivery is not delivery:
                progress = None
            of_handler = progress is not None and progress.in_handler
            if isinstance(error, UNRELATED) and not of_handler:
                raise
            continuation = classify(
                delivery,
                error,
                self.transient_errors,
                policy=delivery.task.retry_policy or self.policy,
                next_attempt=progress.next_attempt if progress else None,
                of_handler=of_handler,
            )
            return self._conclude(delivery, error, continuation)

    def _handle(self, delivery: Delivery, args: Sequence[Any], kwargs: dict[str, Any]) -> Ending:
        """Handle the message in one transaction: admit, handle, record, commit."""
        with self.units.begin(delivery) as unit:
            turn, cursor = self.turns.turn_of(unit)
            if turn is Turn.later:
                return HandlerResult(ignored=self.turns.park(unit))
            connection, identity = unit.connection, delivery.identity
            if recorded := self.inbox.admit(connection, delivery.consumer, identity):
                if turn is Turn.past:
                    self.turns.pass_on_again(unit)
                self._reply_again(unit, recorded)
                _warn_of_reuse(delivery)
                return Copy(delivery, recorded)
            if turn is Turn.past:
                raise OutOfSequence("another message has been handled in its position")
            if verdict := delivery.request.get(VERDICT):
                raise Unwanted(verdict)
            checkpoints.reach("inbox.admitted")
            unit.progress.in_handler = True
            with exceptions_only():
                ending = handler.run(delivery.task, args, kwargs)
                unit.flush()
            unit.progress.in_handler = False
            self._reply(unit, ending)
            checkpoints.reach("delivery.handled")
            outcome = Outcome.skipped if ending.ignored else Outcome.done
            self.inbox.record(connection, delivery.consumer, identity, outcome, ending.recorded)
            successor = self.turns.advance(unit, cursor)
            unit.commit()
        self.turns.pass_on(delivery, successor)
        checkpoints.reach("delivery.committed")
        unit.outgoing.dispatch()
        return ending

    def _conclude(self, delivery: Delivery, error: Exception, continuation: Continuation) -> Ending:
        """Record what follows from a failed attempt; return what Celery has to know of it."""
        try:
            match continuation:
                case NextAttempt(message):
                    return self._retry(delivery, message, error)
                case TryAgain(due):
                    retry = Retry(exc=presentable(error), when=due)
                    return self._retry(delivery, again(delivery, due), retry)
                case RunAgain(cause):
                    raise Transient from cause
                case Requeue():
                    raise Reject(presentable(error), requeue=True) from error
                case Refuse(verdict):
                    delivery.request.errbacks = None  # as with Celery, which calls none of them
                    self.failures.dead_letter(delivery, Reason(verdict), TaskRevokedError(verdict))
                    handler.report_revocation(delivery.task, verdict)
                    return Unsuccessful(Ignore(f"the message is {verdict}"))
                case Dead(reason, failure):
                    self.failures.dead_letter(delivery, reason, failure)
                    return Unsuccessful(presentable(failure))
                case Done():
                    return Unsuccessful(error)
        except Ignore as another_copy:
            return Unsuccessful(another_copy)

    def _retry(self, delivery: Delivery, next_attempt: Message, ending: Exception) -> Ending:
        """Record a next attempt; if the outbox refuses it, the message fails for good."""
        try:
            self.failures.retry(delivery, next_attempt)
        except (Transient, Stalled, *UNRELATED):
            raise
        except Exception as error:
            return self._conclude(delivery, error, classify(delivery, error, self.transient_errors))
        return Unsuccessful(ending)

    def _reply(self, unit: UnitOfWork, ending: HandlerResult) -> None:
        """Reply to a request with the handler's result, unless another task will reply."""
        if unit.progress.replier:
            return
        if ending.ignored:
            self.responder.fail(unit.delivery, ending.ignored)
        else:
            self.responder.succeed(unit.delivery, ending.result)

    def _reply_again(self, unit: UnitOfWork, recorded: RecordedOutcome) -> None:
        """Reply to a copy of a request as to the first one, if that one has ended."""
        delivery = unit.delivery
        if delivery.reply_to is None or recorded.outcome not in (Outcome.done, Outcome.dead):
            return
        value = handler.decoded(delivery.task, recorded.result)
        if recorded.outcome is Outcome.done:
            self.responder.succeed(delivery, value)
        elif isinstance(value, Exception):
            self.responder.fail(delivery, value)
        unit.commit()
        unit.outgoing.dispatch()

    def _count(self, delivery: Delivery) -> Ending | None:
        """Count a redelivery, in a transaction of its own; one too many is a dead letter."""
        with self.engine.begin() as connection:
            if self.inbox.find(connection, delivery.consumer, delivery.identity):
                return None
            cause = self.attempts.cause(connection, delivery.consumer, delivery.identity)
            deliveries = self.attempts.count(connection, delivery.consumer, delivery.identity)
        checkpoints.reach("delivery.started")
        if deliveries <= (MOST_STALLS if cause == IDLE else self.max_deliveries):
            return None
        dead = lost(deliveries, cause, self.transaction_timeout)
        return self._conclude(delivery, dead.error, dead)

    def record_time_limit(self, consumer: str, headers: Mapping[str, Any]) -> None:
        """Record that the delivery in progress of a message ended with its hard time limit.

        Should the message become a dead letter, this is its reason.
        """
        identity = Identity.of_headers(headers) or headers[WIRE].foreign_identity
        self._record_cause(consumer, identity, TIME_LIMIT)

    def _record_cause(self, consumer: str, identity: Identity, cause: str) -> None:
        with suppress(SQLAlchemyError), self.engine.begin() as connection:
            if not self.inbox.find(connection, consumer, identity):
                self.attempts.record_cause(connection, consumer, identity, cause)

    def _despite_outages(self, delivery: Delivery, step: Callable[..., T], *arguments: Any) -> T:
        """Run *step*, repeatedly while the database is busy or away."""
        return self.transient_errors.retry(
            partial(step, delivery, *arguments), forgive=partial(self._forgive, delivery)
        )

    def _forgive(self, delivery: Delivery) -> None:
        """Reset the count of redeliveries: the next one is not due to a lost worker."""
        with suppress(SQLAlchemyError), self.engine.begin() as connection:
            self.attempts.delete(connection, delivery.consumer, delivery.identity)


def _warn_of_reuse(delivery: Delivery) -> None:
    """Log a copy that may be a message of its own, whose publisher has used a task id again."""
    if delivery.is_foreign and not delivery.redelivered:
        log.warning(
            "%s is taken for a copy of a message that was handled before: task id, arguments and "
            "publishing process are the same. If it is a call of its own, publish it with a task "
            "id of its own, or from an app with celery_eda.",
            delivery.log_name,
        )
