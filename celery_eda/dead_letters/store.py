"""Messages that could not be sent or handled, stored whole until a repairer or a person decides.

A dead letter is written in the transaction that removes the message from the inbox or the outbox,
so a message is never lost and never in both. It is *open* until it is redriven, skipped or
discarded, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Table, and_, exists, func, insert, update
from sqlalchemy import select as select_rows

from celery_eda.core import redaction
from celery_eda.core.arguments import Arguments
from celery_eda.core.clock import utc
from celery_eda.core.error_text import text_of, traceback_of
from celery_eda.core.limits import NAME_LENGTH
from celery_eda.core.message import Message
from celery_eda.databases import Dialect, Retention, message_rows
from celery_eda.dead_letters.letter import Letter, LetterFilter, LetterState, Reason
from celery_eda.dead_letters.reduced import reduced
from celery_eda.errors import UnreadableBody

log = redaction.logger(__name__)

#: The largest number of attempts that the column holds.
MOST_ATTEMPTS = 2**31 - 1
#: Columns with names, which a message may spell as no database stores them.
_NAMES = ("task", "queue", "exchange", "routing_key", "content_type", "content_encoding")


@dataclass(frozen=True)
class DeadLetterStore:
    """The dead letters of one database."""

    table: Table
    dialect: Dialect

    def retention(self, audit: Table, seconds: float | None) -> Retention:
        """Letters that are not open may be deleted *seconds* after the last action on them."""

        def closed(before: datetime) -> ColumnElement[bool]:
            letter = self.table.c
            touched = exists().where(audit.c.dead_letter == letter.id, audit.c.at >= before)
            return and_(letter.state != LetterState.open.value, ~touched)

        return Retention("dead_letters", self.table, self.dialect, seconds, closed)

    def add(
        self,
        connection: Connection,
        message: Message,
        reason: Reason,
        *,
        error: BaseException | str,
        attempts: int,
        consumer: str | None = None,
        first_at: datetime | None = None,
    ) -> int:
        """Store *message* as an open letter.

        *consumer* is None for a message that reached none. *first_at* is the end of the first
        attempt; None stands for now. Arguments that look secret are redacted in the error's text.

        Returns:
            The id of the letter.
        """
        secrets = _secrets(message)
        position = message.position
        failure = {
            "created_at": self.dialect.now(),
            "consumer": consumer,
            "reason": reason.value,
            "error_type": _type_of(error),
            "error": text_of(error, secrets),
            "traceback": traceback_of(error, secrets),
            "attempts": min(attempts, MOST_ATTEMPTS),
            "at": self.dialect.now(),
            "state": LetterState.open.value,
            "first_at": first_at or self.dialect.now(),
            "ordering_key": position and position.lane.key,
            "correlation_id": _name(message.headers.get("root_id")),
            "causation_id": _name(message.headers.get("parent_id")),
        }
        return self._insert_whole(connection, message, failure)

    def _insert_whole(
        self, connection: Connection, message: Message, failure: Mapping[str, Any]
    ) -> int:
        """Insert a letter with the whole message, or in reduced form if the database refuses it."""
        columns = _columns(message)
        if (why := self.dialect.refusal_of(connection, columns)) is None:
            try:
                with connection.begin_nested():
                    return self._insert(connection, columns, failure)
            except Exception as error:
                if not self.dialect.is_of_values(error):
                    raise
                why = f"the database refuses it: {type(error).__name__}"
        log.error(
            "a dead letter of %s is stored in reduced form: %s. Write all its arguments again "
            "(`eda dead-letters edit`) before you redrive it.",
            columns["task"],
            why,
        )
        return self._insert(connection, _columns(reduced(message, why)), failure)

    def _insert(
        self, connection: Connection, columns: Mapping[str, Any], failure: Mapping[str, Any]
    ) -> int:
        result = connection.execute(insert(self.table).values(**columns, **failure))
        row_id: int = result.inserted_primary_key[0]  # type: ignore[index]  # it has one
        return row_id

    def find(self, connection: Connection, id: int, *, lock: bool = False) -> Letter | None:
        """The letter with this *id*; None if there is none.

        With *lock* its row is locked until this transaction ends. A concurrent transaction that
        locks it waits, and then reads the committed state.
        """
        table = self.table
        if lock:
            # An UPDATE, because SQLite ignores FOR UPDATE.
            same = update(table).where(table.c.id == id).values(state=table.c.state)
            connection.execute(same)
        query = select_rows(table).where(table.c.id == id)
        # FOR UPDATE here too: at REPEATABLE READ MariaDB would read the row of its old snapshot.
        row = connection.execute(query.with_for_update() if lock else query).one_or_none()
        return None if row is None else _from_row(row)

    def select(
        self, connection: Connection, which: LetterFilter, limit: int = 100, after: int = 0
    ) -> Sequence[Letter]:
        """At most *limit* letters that match, by ascending id, with ids above *after*."""
        query = (
            select_rows(self.table)
            .where(self.table.c.id > after, *which.conditions(self.table))
            .order_by(self.table.c.id)
            .limit(limit)
        )
        return [_from_row(row) for row in connection.execute(query)]

    def count(self, connection: Connection, which: LetterFilter) -> int:
        """Number of letters that match."""
        query = select_rows(func.count()).select_from(self.table)
        return connection.execute(query.where(*which.conditions(self.table))).scalar_one()

    def change(self, connection: Connection, id: int, message: Message) -> None:
        """Replace the message of the letter with *message*."""
        values = _columns(message)
        connection.execute(update(self.table).where(self.table.c.id == id).values(values))

    def close(self, connection: Connection, id: int, state: LetterState) -> None:
        """Set the final state of an open letter, whose row this transaction has locked."""
        connection.execute(
            update(self.table).where(self.table.c.id == id).values(state=state.value)
        )


def _secrets(message: Message) -> list[str]:
    """Texts to redact: secret arguments of *message*, and those of the task in progress."""
    try:
        named = redaction.secrets_of(Arguments.of(message).kwargs)
    except UnreadableBody:
        named = []
    return [*named, *redaction.secrets_in_progress()]


def _type_of(error: BaseException | str) -> str | None:
    if isinstance(error, str):
        return None
    return _name(type(error).__qualname__)


def _columns(message: Message) -> dict[str, Any]:
    values = message_rows.to_row(message)
    del values["delay"]
    return {**values, **{name: _name(values[name]) for name in _NAMES}}


def _from_row(row: Row[Any]) -> Letter:
    return Letter(
        id=row.id,
        message=message_rows.from_row(row),
        consumer=row.consumer,
        reason=row.reason,
        error_type=row.error_type,
        error=row.error,
        traceback=row.traceback,
        attempts=row.attempts,
        first_at=row.first_at and utc(row.first_at),
        at=utc(row.at),
        state=row.state,
        key=row.ordering_key,
        correlation_id=row.correlation_id,
        causation_id=row.causation_id,
    )


def _name(value: Any) -> str | None:
    """*value* as a column holds it; None if it is no text."""
    if not isinstance(value, str):
        return None
    return redaction.storable(value[:NAME_LENGTH])[:NAME_LENGTH]
