"""Messages that could not be sent or handled, kept whole and visible.

A dead letter is written in the transaction that takes the message off the road, so it is always
in exactly one place.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from enum import Enum

from sqlalchemy import Connection, Table, insert

from celery_eda import outbox
from celery_eda.dialects.base import Dialect
from celery_eda.message import Message
from celery_eda.tables import NAME_LENGTH

#: Characters of an error's text and of its traceback that are kept.
LONGEST_ERROR = 10_000


class Reason(str, Enum):
    """Why a message became a dead letter."""

    failed = "failed"
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


@dataclass(frozen=True)
class DeadLetters:
    """The dead letters of one database."""

    table: Table
    dialect: Dialect

    def add(
        self,
        connection: Connection,
        message: Message,
        reason: Reason,
        *,
        error: BaseException | str,
        attempts: int,
        consumer: str | None = None,
    ) -> None:
        """Keep *message*; ``consumer`` is None if it never reached one."""
        values = outbox.to_row(message)
        del values["delay"]
        connection.execute(
            insert(self.table).values(
                **values,
                created_at=self.dialect.now(),
                consumer=consumer,
                reason=reason.value,
                error_type=type(error).__qualname__[:NAME_LENGTH]
                if isinstance(error, BaseException)
                else None,
                error=text_of(error),
                traceback=_traceback(error),
                attempts=attempts,
                at=self.dialect.now(),
            )
        )


def text_of(error: BaseException | str) -> str:
    """The text of *error*, bounded; an exception's ``__str__`` may itself fail."""
    try:
        text = str(error)
    except Exception:
        text = f"<{type(error).__qualname__} without a readable text>"
    return _storable(text[:LONGEST_ERROR])


def _traceback(error: BaseException | str) -> str | None:
    if isinstance(error, str):
        return None
    frames = "".join(traceback.format_tb(error.__traceback__))
    return _storable(frames[-LONGEST_ERROR:])


def _storable(text: str) -> str:
    """*text* without what a database refuses: lone surrogates, and NUL on PostgreSQL."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")
