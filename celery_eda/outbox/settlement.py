"""The settlement of claimed rows: each row is cleared, postponed, released or made a dead letter.

The broker's answer decides, or the prerequisite that failed before the message was sent.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from sqlalchemy import Connection

from celery_eda.brokers import PublishResult, Verdict
from celery_eda.core import addresses, redaction
from celery_eda.core.event import EVENT_EXCHANGE
from celery_eda.core.retry import OUTAGE_DELAY, backoff
from celery_eda.core.settings import Settings
from celery_eda.dead_letters import DeadLetterStore, Reason
from celery_eda.outbox.batch import Batch
from celery_eda.outbox.store import OutboxStore, Pending

log = redaction.logger(__name__)


@dataclass(frozen=True)
class RelayResult:
    """The numbers of messages, by their fate.

    Attributes:
        confirmed: the broker has them.
        dropped: replies to processes that have ended, and events without a subscription.
        refused: refused by the broker, with a queue that is down, or with a prerequisite that
            failed. They are retried later.
        unknown: the broker was away. They stay in the outbox as they were.
    """

    confirmed: int = 0
    dropped: int = 0
    refused: int = 0
    unknown: int = 0

    def __add__(self, other: RelayResult) -> RelayResult:
        return RelayResult(*map(operator.add, astuple(self), astuple(other)))

    @property
    def claimed(self) -> int:
        return self.confirmed + self.dropped + self.refused + self.unknown


@dataclass(frozen=True)
class Settlement:
    """Settles the rows that one relay has claimed.

    Attributes:
        owner: names the relay; rows that another relay has claimed meanwhile stay as they are.
    """

    outbox: OutboxStore
    dead_letters: DeadLetterStore
    settings: Settings
    owner: str

    def settle(self, batch: Batch) -> RelayResult:
        """Record the broker's answers to *batch*, in the transaction of its claim."""
        return self._record(batch.connection, batch.answered, batch.unprepared)

    def release(self, batch: Batch) -> None:
        """Give up the claim on *batch*, which was not sent."""
        connection = batch.connection
        self._postpone_unprepared(connection, batch.unprepared)
        self.outbox.release(connection, self.owner, [each.id for each in batch.sendable])

    def _record(
        self,
        connection: Connection,
        answered: Sequence[tuple[Pending, PublishResult]],
        unprepared: Mapping[int, str],
    ) -> RelayResult:
        """Clear the confirmed rows, postpone those that cannot be sent, release the others."""
        confirmed, refused, unavailable, unknown = (
            [pair for pair in answered if pair[1].verdict is verdict]
            for verdict in (
                Verdict.confirmed, Verdict.refused, Verdict.unavailable, Verdict.unknown,
            )
        )  # fmt: skip
        dropped = [each for each, answer in refused if _may_be_dropped(each, answer)]
        gone = [*(each for each, _ in confirmed), *dropped]
        self.outbox.clear(connection, self.owner, [each.id for each in gone])
        _log_dropped(dropped)
        for each, answer in refused:
            if each not in dropped:
                self._refuse(connection, each, answer.why)
        self._postpone_unprepared(connection, unprepared)
        self._await_queues(connection, unavailable)
        if unknown:
            self._leave(connection, unknown, broker_answers=bool(confirmed))
        return RelayResult(
            confirmed=len(confirmed),
            dropped=len(dropped),
            refused=len(refused) - len(dropped) + len(unavailable) + len(unprepared),
            unknown=len(unknown),
        )

    def _leave(
        self,
        connection: Connection,
        unknown: Sequence[tuple[Pending, PublishResult]],
        *,
        broker_answers: bool,
    ) -> None:
        """Leave messages with an unknown fate in the outbox; no attempt is charged."""
        why = unknown[0][1].why
        log.warning("%d messages stay in the outbox, to be sent again: %s", len(unknown), why)
        at_once = []
        for each, answer in unknown:
            if broker_answers and answer.is_late:
                # A queue that never confirms must not hold up the others.
                self._postpone(connection, each.id, self.settings.claim_timeout, answer.why)
            else:
                at_once.append(each.id)
        self.outbox.release(connection, self.owner, at_once)

    def _await_queues(
        self, connection: Connection, unavailable: Sequence[tuple[Pending, PublishResult]]
    ) -> None:
        """Let messages rest whose queues are down; no attempt is charged."""
        for each, answer in unavailable:
            self._postpone(connection, each.id, OUTAGE_DELAY[1], answer.why)
        if unavailable:
            log.warning(
                "%d messages wait for queues that are down, and are sent when these are up: %s",
                len(unavailable),
                unavailable[0][1].why,
            )

    def _postpone_unprepared(self, connection: Connection, unprepared: Mapping[int, str]) -> None:
        for row_id, why in unprepared.items():
            self._postpone(connection, row_id, OUTAGE_DELAY[1], why)

    def _postpone(self, connection: Connection, row_id: int, delay: float, why: str) -> None:
        self.outbox.postpone(connection, self.owner, row_id, delay, why, charged=False)

    def _refuse(self, connection: Connection, pending: Pending, why: str) -> None:
        attempts = pending.attempts + 1
        if attempts >= self.settings.max_attempts:
            if message := self.outbox.withdraw(connection, self.owner, pending.id):
                log.error("dead letter: %s cannot be sent: %s", message.task, why)
                self.dead_letters.add(
                    connection, message, Reason.unsendable, error=why, attempts=attempts
                )
            return
        delay = backoff(pending.attempts, self.settings.retry_delay, self.settings.retry_delay_max)
        log.warning(
            "%s was refused by the broker, next try in %.1f s: %s", pending.message.task, delay, why
        )
        self.outbox.postpone(connection, self.owner, pending.id, delay, why)


def _may_be_dropped(pending: Pending, answer: PublishResult) -> bool:
    """True if an unroutable message may be dropped.

    That is a reply to a process that has ended, or an event without a subscription.
    """
    is_reply = addresses.is_volatile(pending.message.routing_key)
    return answer.unroutable and (is_reply or _is_event(pending))


def _is_event(pending: Pending) -> bool:
    return pending.message.exchange == EVENT_EXCHANGE


def _log_dropped(dropped: Sequence[Pending]) -> None:
    events = sum(map(_is_event, dropped))
    if replies := len(dropped) - events:
        log.warning("%d replies are dropped: the processes that asked have ended", replies)
    if events:
        log.info("%d events have no subscription", events)
