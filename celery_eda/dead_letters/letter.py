"""Dead letters as values: each a message that could not be sent or handled, and its failure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from uuid import UUID

from sqlalchemy import ColumnElement, Table, or_

from celery_eda.core.clock import utc
from celery_eda.core.message import Message


class Reason(str, Enum):
    """The reason for which a message became a dead letter."""

    failed = "failed"
    exhausted = "retries exhausted"
    rejected = "rejected"
    lost_worker = "lost worker"
    malformed = "malformed"
    unsendable = "unsendable"
    out_of_sequence = "out of sequence"
    undecodable = "undecodable"
    unknown_task = "unknown task"
    too_large = "too large"
    expired = "expired"
    revoked = "revoked"
    time_limit = "time limit"


class LetterState(str, Enum):
    """The state of a dead letter; every state but ``open`` is final.

    ``open``: waits for a repairer or a person. ``redriven``: its message was sent again, as the
    next revision. ``skipped``: its message was abandoned, and the next one of its key took its
    turn. ``discarded``: its message was abandoned.
    """

    open = "open"
    redriven = "redriven"
    skipped = "skipped"
    discarded = "discarded"


@dataclass(frozen=True)
class Letter:
    """A dead letter: a message that could not be sent or handled.

    Attributes:
        message: the whole message, as it was received or captured.
        consumer: the task that could not handle it; None if it reached none.
        reason: value of a :class:`Reason`, or one that a newer version of this library wrote.
        error_type: name of the exception's class, without its module.
        error, traceback: of the last failure, bounded and without secrets.
        attempts: number of failed attempts.
        first_at: end of the first attempt, in UTC.
        at: time at which the message became a dead letter, in UTC.
        state: value of a :class:`LetterState`.
        key: ordering key of the message; None if it has none.
        correlation_id: id of the task at the root of the workflow.
        causation_id: id of the task that published the message.
    """

    id: int
    message: Message
    consumer: str | None
    reason: str
    error_type: str | None
    error: str | None
    traceback: str | None
    attempts: int
    first_at: datetime | None
    at: datetime
    state: str
    key: str | None
    correlation_id: str | None
    causation_id: str | None

    @property
    def is_open(self) -> bool:
        return self.state == LetterState.open.value


@dataclass(frozen=True)
class LetterFilter:
    """Conditions on dead letters, all of which must hold; None is no condition.

    Attributes:
        ids: the letter is one of these.
        queue: name of the queue, or the routing key.
        error_type: name of the exception's class, without its module.
        key: the ordering key.
        message_id: the message, in any of its revisions.
        since, until: bounds of the time of death, the latter excluded; UTC if naive.
    """

    ids: tuple[int, ...] | None = None
    task: str | None = None
    queue: str | None = None
    error_type: str | None = None
    key: str | None = None
    reason: str | None = None
    state: str | None = None
    message_id: UUID | None = None
    since: datetime | None = None
    until: datetime | None = None

    def conditions(self, table: Table) -> Iterator[ColumnElement[bool]]:
        """The conditions as SQL, on the table of dead letters."""
        columns = table.c
        if self.ids is not None:
            yield columns.id.in_(self.ids)
        if self.queue is not None:
            yield or_(columns.queue == self.queue, columns.routing_key == self.queue)
        if self.key is not None:
            yield columns.ordering_key == self.key
        for name in ("task", "error_type", "reason", "state", "message_id"):
            if (value := getattr(self, name)) is not None:
                yield columns[name] == value
        if self.since is not None:
            yield columns.at >= utc(self.since)
        if self.until is not None:
            yield columns.at < utc(self.until)
