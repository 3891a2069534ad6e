"""What was done to dead letters: by whom, when and why. Nothing here is ever changed.

A record is written in the transaction of what it records: there is none without the deed, and no
deed without its record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from typing import Any
from uuid import UUID

from kombu.utils import json
from sqlalchemy import Connection, Row, Table, func, insert, select

from celery_eda import redaction
from celery_eda.dead_letters import Letter
from celery_eda.dialects.base import Dialect
from celery_eda.limits import NAME_LENGTH


class Action(str, Enum):
    """What was done to a dead letter.

    ``redrive``, ``edit``, ``skip`` and ``discard`` are a person's or a repairer's; ``repair`` is
    a redrive by a repairer; ``leave`` is a repairer's word that a person is needed.
    """

    edit = "edit"
    redrive = "redrive"
    skip = "skip"
    discard = "discard"
    repair = "repair"
    leave = "leave"


@dataclass(frozen=True)
class Author:
    """Who does something to a dead letter, and why."""

    actor: str
    why: str = ""


@dataclass(frozen=True)
class Entry:
    """One record.

    Attributes:
        revision: of the message, before what was done.
        detail: what else is to be known, e.g. the old body.
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
    """The records of one database."""

    table: Table
    dialect: Dialect

    def add(
        self, connection: Connection, author: Author, action: Action, letter: Letter, **detail: Any
    ) -> None:
        """Record what *author* does to *letter*."""
        connection.execute(
            insert(self.table).values(
                at=self.dialect.now(),
                actor=redaction.storable(author.actor[:NAME_LENGTH])[:NAME_LENGTH],
                action=action.value,
                why=redaction.storable(redaction.redact(author.why)),
                dead_letter=letter.id,
                consumer=letter.consumer,
                message_id=letter.message.identity.id,
                revision=letter.message.identity.revision,
                detail=json.dumps(detail) if detail else None,
            )
        )

    def of_message(self, connection: Connection, message_id: UUID) -> Sequence[Entry]:
        """All that was done to the letters of one message, in the order it was done."""
        columns = self.table.c
        query = select(self.table).where(columns.message_id == message_id).order_by(columns.id)
        return [_from_row(row) for row in connection.execute(query)]

    def count(self, connection: Connection, message_id: UUID, action: Action) -> int:
        """How often *action* was done to one message."""
        columns = self.table.c
        query = select(func.count()).where(
            columns.message_id == message_id, columns.action == action.value
        )
        return connection.execute(query).scalar_one()


def _from_row(row: Row[Any]) -> Entry:
    at = row.at if row.at.tzinfo else row.at.replace(tzinfo=timezone.utc)
    return Entry(
        at,
        row.actor,
        row.action,
        row.why or "",
        row.dead_letter,
        row.revision,
        json.loads(row.detail) if row.detail else {},
    )
