"""The record of a failed attempt, committed with the next attempt or with a dead letter."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from celery.exceptions import Ignore

from celery_eda.core import redaction
from celery_eda.core.delivery import Delivery
from celery_eda.core.error_text import presentable
from celery_eda.core.interruption import exceptions_only
from celery_eda.core.message import Message
from celery_eda.dead_letters import DeadLetterStore, Reason, RepairTasks
from celery_eda.inbox import handler
from celery_eda.inbox.ordering import TurnKeeper
from celery_eda.inbox.store import InboxStore, Outcome
from celery_eda.inbox.transient import TransientErrors
from celery_eda.inbox.unit_of_work import UnitOfWork, UnitsOfWork
from celery_eda.outbox import Transaction
from celery_eda.requests import Responder

log = redaction.logger(__name__)


@dataclass(frozen=True)
class Failures:
    """Records failed attempts, each in one transaction with the next attempt or the dead letter."""

    inbox: InboxStore
    dead_letters: DeadLetterStore
    units: UnitsOfWork
    turns: TurnKeeper
    responder: Responder
    transient_errors: TransientErrors
    repair_tasks: RepairTasks

    def retry(self, delivery: Delivery, next_attempt: Message) -> None:
        """Record a failed attempt together with the message of the next one.

        Raises:
            Ignore: another copy of the same attempt has recorded its end.
        """
        with self.units.begin(delivery) as unit:
            self._record(unit, Outcome.retried)
            unit.outgoing.capture(next_attempt)
            unit.commit()
        unit.outgoing.dispatch()

    def dead_letter(self, delivery: Delivery, reason: Reason, error: Exception) -> None:
        """Record a failure for good together with the dead letter and the errbacks.

        Raises:
            Ignore: another copy of the same attempt has recorded its end.
        """
        outgoing = self._record_death(delivery, reason, error)
        log.error("dead letter: %s %s", delivery.log_name, reason.value)
        outgoing.dispatch()

    def _record_death(self, delivery: Delivery, reason: Reason, error: Exception) -> Transaction:
        shown = presentable(error)
        with self.units.begin(delivery) as unit:
            self._record(unit, Outcome.dead, handler.recorded(delivery.task, shown))
            letter = self.dead_letters.add(
                unit.connection,
                delivery.as_message(),
                reason,
                error=error,
                attempts=delivery.retries + 1,
                consumer=delivery.consumer,
                first_at=self.inbox.first_at(unit.connection, delivery.consumer, delivery.identity),
            )
            self._publish_errbacks(unit, shown)
            self.responder.fail(delivery, shown)
            self._publish_repair(unit, error, letter)
            self.turns.block_or_skip(unit)
            unit.commit()
        return unit.outgoing

    def _publish_repair(self, unit: UnitOfWork, error: Exception, letter: int) -> None:
        """Publish the repair, if the task has one; without it the letter waits for a person."""
        try:
            self.repair_tasks.dispatch(unit.delivery.task, error, letter)
        except Exception:
            log.exception(
                "the repair of %s cannot be published; its dead letter stays open",
                unit.delivery.log_name,
            )

    def _publish_errbacks(self, unit: UnitOfWork, error: Exception) -> None:
        """Call or publish the errbacks; an error in one of them does not cost the dead letter."""
        request = unit.delivery.request
        if not request.errbacks:
            return
        handler.report_failure(unit.delivery.task, error)
        try:
            with unit.connection.begin_nested(), exceptions_only():
                handler.publish_errbacks(unit.delivery.task, error)
                unit.flush()
        except Exception as failure:
            if self.transient_errors.includes(failure):
                raise
            log.exception("an errback of %s failed, none is called", unit.delivery.log_name)
            request.errbacks = None

    def _record(self, unit: UnitOfWork, outcome: Outcome, recorded: bytes | None = None) -> None:
        """Record the outcome of an attempt that has no effect.

        Raises:
            Ignore: another copy of the same attempt has recorded its end.
        """
        delivery = unit.delivery
        if not self.inbox.record_failure(
            unit.connection, delivery.consumer, delivery.identity, outcome, recorded
        ):
            raise Ignore("another copy of this attempt has been recorded")


def again(delivery: Delivery, due: datetime) -> Message:
    """The next attempt by a retry policy: the same message, to be sent at *due*."""
    message = delivery.as_message()
    headers = {**message.headers, "retries": delivery.retries + 1}
    return message.revised(headers=headers, due=due)
