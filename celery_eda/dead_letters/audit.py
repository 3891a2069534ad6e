"""The audit trail of repairs: who did what, when and why. Entries are never changed.

An entry is written in the transaction of the action, so there is no entry without its action and
no action without its entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any
from uuid import UUID

from kombu.utils import json
from sqlalchemy import ColumnElement, Connection, Row, Table, exists, func, insert, select

from celery_eda.core import redaction
from celery_eda.core.clock import utc
from celery_eda.core.identity import Identity
from celery_eda.core.limits import NAME_LENGTH
from celery_eda.databases import Dialect, Retention
from celery_eda.dead_letters.letter import Letter
from celery_eda.ordering import WaitingKey


class Action(str, Enum):
    """An action on a dead letter, or on a key that waits for a lost message (``skip-gap``).

    ``redrive``, ``edit``, ``skip`` and ``discard`` are those of a person or a repairer. ``repair``
    is a redrive by a repairer; ``leave`` is a repairer's decision that a person is needed.
    """

    edit = "edit"
    redrive = "redrive"
    skip = "skip"
    discard = "discard"
    repair = "repair"
    leave = "leave"
    skip_gap = "skip-gap"


@dataclass(frozen=True)
class Author:
    """The person or repairer who acts, with the reason."""

    actor: str
    why: str = ""


@dataclass(frozen=True)
class AuditEntry:
    """One entry.

    Attributes:
        at: time of the action, in UTC.
        action: value of an :class:`Action`, or one that a newer version of this library wrote.
        dead_letter: id of the letter; None if the action was on a key.
        revision: of the message, before the action.
        detail: further facts, e.g. ``{"body": …}``, the old body of an edited message.
    """

    at: datetime
    actor: str
    action: str
    why: str
    dead_letter: int | None
    revision: int | None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Audit:
    """The audit trail in one database."""

    table: Table
    dialect: Dialect

    def retention(self, letters: Table, seconds: float | None) -> Retention:
        """Entries of dead letters that are gone may be deleted after *seconds*."""

        def orphaned(before: datetime) -> ColumnElement[bool]:
            return ~exists().where(letters.c.id == self.table.c.dead_letter)

        return Retention("audit", self.table, self.dialect, seconds, orphaned)

    def add(
        self, connection: Connection, author: Author, action: Action, letter: Letter, **detail: Any
    ) -> None:
        """Record that *author* does *action* to *letter*."""
        identity = letter.message.identity
        self._insert(
            connection, author, action, letter.consumer, identity, detail, dead_letter=letter.id
        )

    def add_skipped_gap(
        self, connection: Connection, author: Author, key: WaitingKey, next_one: Identity
    ) -> None:
        """Record that *author* lets *key* go on with the message *next_one*."""
        lane = key.lane
        detail = {
            "source": lane.source,
            "stream": lane.scope,
            "key": lane.key,
            "after": [key.epoch, key.last],
            "next": list(key.following),
        }
        self._insert(connection, author, Action.skip_gap, key.consumer, next_one, detail)

    def _insert(
        self,
        connection: Connection,
        author: Author,
        action: Action,
        consumer: str | None,
        identity: Identity,
        detail: Mapping[str, Any],
        dead_letter: int | None = None,
    ) -> None:
        connection.execute(
            insert(self.table).values(
                at=self.dialect.now(),
                actor=redaction.storable(author.actor[:NAME_LENGTH])[:NAME_LENGTH],
                action=action.value,
                why=redaction.storable(redaction.redact(author.why)),
                dead_letter=dead_letter,
                consumer=consumer,
                message_id=identity.id,
                revision=identity.revision,
                detail=json.dumps(detail) if detail else None,
            )
        )

    def of_message(self, connection: Connection, message_id: UUID) -> Sequence[AuditEntry]:
        """All entries on the letters of one message, oldest first."""
        columns = self.table.c
        query = select(self.table).where(columns.message_id == message_id).order_by(columns.id)
        return [_from_row(row) for row in connection.execute(query)]

    def count(self, connection: Connection, message_id: UUID, action: Action) -> int:
        """Number of times that *action* was done to one message."""
        columns = self.table.c
        query = select(func.count()).where(
            columns.message_id == message_id, columns.action == action.value
        )
        return connection.execute(query).scalar_one()


def _from_row(row: Row[Any]) -> AuditEntry:
    return AuditEntry(
        at=utc(row.at),
        actor=row.actor,
        action=row.action,
        why=row.why or "",
        dead_letter=row.dead_letter,
        revision=row.revision,
        detail=json.loads(row.detail) if row.detail else {},
    )
