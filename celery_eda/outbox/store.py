"""The outbox: messages that are committed and not sent yet.

A row is written in the transaction that published the message. It is deleted only when the broker
has confirmed that very message.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Connection, Row, Table, func, select

from celery_eda.core import redaction
from celery_eda.core.identity import Identity
from celery_eda.core.message import Encoded, Message
from celery_eda.databases import Dialect, from_row, json_of, read_prerequisites, to_row

log = logging.getLogger(__name__)

#: Seconds after which messages of another service are reported that no relay has sent.
ABANDONED = 300.0
#: Seconds until a row that cannot be read is tried again.
UNREADABLE_DELAY = 3600.0
#: The columns that are read of a row with an envelope: less than half of its bytes.
_ENOUGH_TO_SEND = (
    "id",
    "attempts",
    "message_id",
    "revision",
    "task",
    "queue",
    "exchange",
    "routing_key",
    "preparation",
    "body",
    "envelope",
)
#: The columns that are read where the broker has no envelopes.
_WHOLE = (*_ENOUGH_TO_SEND, "content_type", "content_encoding", "headers", "properties")

_first_two, _last = itemgetter(0, 1), itemgetter(-1)


class Pending(NamedTuple):
    """A claimed row.

    Attributes:
        id: the row's id. Ids ascend in the order of writing, which is not that of committing.
        attempts: how often the broker has refused the message before.
    """

    id: int
    message: Message | ClaimedMessage
    attempts: int


@dataclass(frozen=True)
class OutboxStore:
    """The outbox of one database.

    Attributes:
        service: whose messages these are; relays of other services leave them.
        seal: encodes headers and properties in the format of the broker when a message is
            captured, so that a relay need not read and encode them; None leaves that to the relay.
    """

    table: Table
    dialect: Dialect
    seal: Callable[[Message], bytes | None] | None = None
    service: str | None = None

    def add(self, connection: Connection, messages: Sequence[Message]) -> list[int]:
        """Write *messages* in one statement; returns the ids of the rows, in the same order."""
        rows = [
            {**to_row(each), "envelope": self._envelope(each), "service": self.service}
            for each in messages
        ]
        return self.dialect.add(connection, self.table, rows)

    def encode(self, message: Message) -> Encoded:
        """Headers and properties of *message*, as its row stores them."""
        return Encoded(*json_of(message), self._envelope(message))

    def _envelope(self, message: Message) -> bytes | None:
        return message.envelope or (self.seal(message) if self.seal else None)

    def claim(
        self,
        connection: Connection,
        owner: str,
        limit: int,
        ids: Sequence[int] = (),
        after: int = 0,
    ) -> list[Pending]:
        """Claim rows that are due. No other relay gets them before they are settled.

        If this process dies first, the claim ends with its connection or its lease.

        A row that cannot be read is postponed with the reason, so that it does not block others.

        Args:
            connection: its transaction is the claim, where the database locks rows.
            owner: names the relay; the other methods settle only rows of the same owner.
            limit: the number of rows at most.
            ids: the rows to claim; by default all that are due.
            after: rows up to this id may be left out, since other relays work there.
        """
        columns = _ENOUGH_TO_SEND if self.seal else _WHOLE
        rows = self.dialect.claim(
            connection, self.table, owner, limit, ids, after, columns, self.service
        )
        message_in = self._reader(connection, rows)
        pending = []
        for row in rows:
            row_id, attempts = _first_two(row)
            try:
                pending.append(Pending(row_id, message_in(row), attempts))
            except Exception as error:
                self._postpone_unreadable(connection, owner, row_id, error)
        return pending

    def abandoned(self, connection: Connection) -> list[str]:
        """Other services with messages that have been due for longer than ``ABANDONED``."""
        table = self.table
        waiting = table.c.service.is_not(None) & (table.c.service != (self.service or ""))
        late = func.coalesce(table.c.available_at, table.c.created_at) < self.dialect.later(
            -ABANDONED
        )
        services = select(table.c.service).where(waiting, late).distinct()
        return sorted(connection.scalars(services))

    def _reader(
        self, connection: Connection, rows: Sequence[Row[Any]]
    ) -> Callable[[Row[Any]], Message | ClaimedMessage]:
        """A function that makes a message of one of the claimed *rows*.

        Where messages are sealed, the rows without an envelope are read again, all in one
        statement: their headers and properties are needed to send them.
        """
        if self.seal is None:
            return from_row
        claimed = ClaimedRows(connection, self.table)
        unsealed = claimed.complete([row[0] for row in rows if _last(row) is None])
        return lambda row: (
            ClaimedMessage.of(row, claimed)
            if _last(row) is not None
            else from_row(unsealed[row[0]])
        )

    def _postpone_unreadable(
        self, connection: Connection, owner: str, row_id: int, error: Exception
    ) -> None:
        why = f"This row cannot be read: {error!r}"
        log.error("outbox row %s is postponed for an hour: %s", row_id, why)
        self.postpone(connection, owner, row_id, UNREADABLE_DELAY, why)

    def withdraw(self, connection: Connection, owner: str, row_id: int) -> Message | None:
        """Delete a claimed row and return all of its message, which becomes a dead letter.

        None if the row stays: another relay has claimed it meanwhile, or it cannot be read.
        """
        try:
            message = ClaimedRows(connection, self.table).message(row_id)
        except (ValueError, TypeError) as error:
            self._postpone_unreadable(connection, owner, row_id, error)
            return None
        return message if self.clear(connection, owner, [row_id]) else None

    def clear(self, connection: Connection, owner: str, ids: Sequence[int]) -> int:
        """Delete rows that the broker has confirmed.

        Returns:
            The number of rows deleted. Rows that another relay has claimed meanwhile stay.
        """
        return self.dialect.clear(connection, self.table, owner, ids) if ids else 0

    def postpone(
        self,
        connection: Connection,
        owner: str,
        row_id: int,
        delay: float,
        why: str,
        *,
        charged: bool = True,
    ) -> None:
        """Make a row due again in *delay* seconds, and store the reason without secrets.

        With *charged* the attempt counts: the broker has refused this very message.
        """
        kept = redaction.storable(redaction.redact(why))
        self.dialect.postpone(connection, self.table, owner, row_id, delay, kept, charged=charged)

    def release(self, connection: Connection, owner: str, ids: Sequence[int]) -> None:
        """End the claim on rows without counting an attempt: the broker was away."""
        if ids:
            self.dialect.release(connection, self.table, owner, ids)


@dataclass(frozen=True)
class ClaimedRows:
    """Rows of the outbox, read by the transaction that has claimed them."""

    connection: Connection
    table: Table

    def message(self, row_id: int) -> Message | None:
        """All of the message in a row; None if the row is gone."""
        chosen = select(self.table).where(self.table.c.id == row_id)
        row = self.connection.execute(chosen).first()
        return None if row is None else from_row(row)

    def complete(self, row_ids: Sequence[int]) -> dict[int, Row[Any]]:
        """The complete rows with these ids, by id, read in one statement."""
        if not row_ids:
            return {}
        chosen = select(self.table).where(self.table.c.id.in_(row_ids))
        return {row.id: row for row in self.connection.execute(chosen)}


class ClaimedMessage(NamedTuple):
    """The parts of a claimed message that the broker needs: its route, body and envelope.

    They are less than half of the row; :meth:`whole` reads all of it. A named tuple, because a
    relay makes one for every message that it sends: a frozen dataclass takes five times as long.

    Attributes:
        rows: the rows that were claimed together with this one.
    """

    row_id: int
    message_id: UUID
    revision: int
    task: str
    queue: str | None
    exchange: str
    routing_key: str
    prerequisites: tuple[tuple[str, Any], ...]
    body: bytes
    envelope: bytes
    rows: ClaimedRows

    @classmethod
    def of(cls, row: Row[Any], rows: ClaimedRows) -> ClaimedMessage:
        # Taken apart at once: asking for one column after the other takes five times as long.
        (
            row_id, _, message_id, revision, task, queue, exchange, routing_key,
            preparation, body, envelope,
        ) = tuple(row)  # fmt: skip
        prepared = read_prerequisites(preparation)
        return cls(
            row_id, message_id, revision, task, queue, exchange, routing_key,
            prepared, body, envelope, rows,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<{self.task} {self.identity}>"

    @property
    def identity(self) -> Identity:
        return Identity(self.message_id, self.revision)

    def whole(self) -> Message:
        """All of the message, read in the transaction of the claim.

        Raises:
            LookupError: the row has left the outbox.
        """
        if (message := self.rows.message(self.row_id)) is None:
            raise LookupError(f"Message {self.message_id} is no longer in the outbox.")
        return message
