"""The messages already handled, so that none takes effect twice.

One row per consumer, message and revision, written in the transaction of that attempt's outcome:
if the transaction rolls back, so does the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from functools import cached_property
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Table,
    Update,
    and_,
    bindparam,
    exists,
    func,
    select,
    update,
)

from celery_eda.core.identity import Identity
from celery_eda.databases import Dialect, LostRace, Retention
from celery_eda.inbox.attempts import attempt, is_attempt


class Outcome(str, Enum):
    """The end of an attempt at a message.

    ``done``: it took effect. ``retried``: the next revision was sent. ``dead``: the message became
    a dead letter. ``skipped``: the handler raised ``Ignore``, or another task replaced it.
    """

    done = "done"
    retried = "retried"
    dead = "dead"
    skipped = "skipped"


@dataclass(frozen=True)
class RecordedOutcome:
    """The recorded outcome of an earlier copy.

    Attributes:
        result: as the result backend encodes it; None if none was recorded.
    """

    outcome: Outcome
    result: bytes | None


@dataclass(frozen=True)
class InboxStore:
    """The inbox of one database."""

    table: Table
    dialect: Dialect

    def retention(
        self, dead_letters: Table, parked: Table, outbox: Table, seconds: float | None
    ) -> Retention:
        """Rows of messages that are in none of these tables may be deleted after *seconds*."""

        def gone(before: datetime) -> ColumnElement[bool]:
            message_id = self.table.c.message_id
            # The outbox has no index on the id. A younger row cannot be of this message.
            waiting = select(outbox.c.message_id).where(outbox.c.created_at < before)
            return and_(
                ~exists().where(dead_letters.c.message_id == message_id),
                ~exists().where(parked.c.message_id == message_id),
                message_id.not_in(waiting),
            )

        return Retention("inbox", self.table, self.dialect, seconds, gone)

    def admit(
        self, connection: Connection, consumer: str, identity: Identity
    ) -> RecordedOutcome | None:
        """Record that *consumer* takes effect with this message, once.

        A concurrent copy waits here until the first one commits or rolls back. On a database that
        admits last, this only reads; :meth:`record` then detects the conflict.

        Returns:
            None if the message is fresh, else the outcome of the earlier copy.

        Raises:
            LostRace: there is an earlier copy, but this transaction cannot see it.
        """
        fresh = self.dialect.admits_first and self._insert(
            connection, consumer, identity, Outcome.done
        )
        if fresh:
            return None
        handled = self.find(connection, consumer, identity)
        if handled is None and self.dialect.admits_first:
            raise LostRace
        return handled

    def record(
        self,
        connection: Connection,
        consumer: str,
        identity: Identity,
        outcome: Outcome = Outcome.done,
        result: bytes | None = None,
    ) -> None:
        """Complete the admission with the outcome.

        Raises:
            LostRace: another copy committed meanwhile.
        """
        if not self.dialect.admits_first:
            if not self._insert(connection, consumer, identity, outcome, result):
                raise LostRace
        elif outcome is not Outcome.done or result is not None:
            its = attempt(consumer, identity)
            values = {"its_outcome": outcome.value, "its_result": result}
            self.dialect.execute(connection, self._completing, {**its, **values})

    def record_failure(
        self,
        connection: Connection,
        consumer: str,
        identity: Identity,
        outcome: Outcome,
        result: bytes | None = None,
    ) -> bool:
        """Record that an attempt ended without taking effect.

        Returns:
            False if an outcome of this attempt is recorded already; the transaction is void then.
        """
        return self._insert(connection, consumer, identity, outcome, result)

    def find(
        self, connection: Connection, consumer: str, identity: Identity
    ) -> RecordedOutcome | None:
        """The recorded outcome of this attempt, if there is one."""
        its = attempt(consumer, identity)
        row = self.dialect.execute(connection, self._finding, its).one_or_none()
        return None if row is None else RecordedOutcome(Outcome(row.outcome), row.result)

    def newest(self, connection: Connection, consumer: str) -> datetime | None:
        """Publishing time of the message that *consumer* has handled last.

        Returns:
            The time by the publisher's clock; None if the inbox has no message of the consumer.
        """
        columns = self.table.c
        query = select(columns.message_id).where(columns.consumer == consumer)
        # Not the highest id: publishers choose ids, and one of the year 9000 would stay the newest.
        newest = connection.scalar(query.order_by(columns.at.desc()).limit(1))
        return None if newest is None else Identity(newest).published

    def first_at(
        self, connection: Connection, consumer: str, identity: Identity
    ) -> datetime | None:
        """Time at which the first attempt at this message ended, whatever its revision."""
        columns = self.table.c
        first: datetime | None = connection.scalar(
            select(func.min(columns.at)).where(
                columns.consumer == consumer, columns.message_id == identity.id
            )
        )
        return first

    def _insert(
        self,
        connection: Connection,
        consumer: str,
        identity: Identity,
        outcome: Outcome,
        result: bytes | None = None,
    ) -> bool:
        values = {
            "consumer": consumer,
            "message_id": identity.id,
            "revision": identity.revision,
            "outcome": outcome.value,
            "result": result,
        }
        return self.dialect.insert_once(connection, self.table, values, now="at")

    @cached_property
    def _completing(self) -> Update:
        completing = update(self.table).where(is_attempt(self.table))
        return completing.values(outcome=bindparam("its_outcome"), result=bindparam("its_result"))

    @cached_property
    def _finding(self) -> Select[Any]:
        columns = self.table.c
        return select(columns.outcome, columns.result).where(is_attempt(self.table))
