"""Durable requests: what was asked, and what came of it, in the requester's own database.

A request is noted in the transaction that publishes it, its reply recorded in the transaction of
its own delivery. So a reply that nobody here asked for is known as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from kombu.serialization import dumps, loads
from sqlalchemy import Connection, Row, Table, select, update

from celery_eda.addresses import REPLY_HEADER, SAGA_HEADER
from celery_eda.dialects.base import Dialect
from celery_eda.errors import UnknownRequest
from celery_eda.message import Message


@dataclass(frozen=True)
class StoredOutcome:
    """The outcome of a request as its row has it: encoded with the serializer of that day."""

    content_type: str
    content_encoding: str
    body: bytes

    def decode(self) -> Any:
        """The arguments of the reply: ``{"result": …}`` or ``{"error": …}``."""
        # Written by this service itself, with the serializer of its choice.
        return loads(self.body, self.content_type, self.content_encoding, force=True)


@dataclass(frozen=True)
class Requests:
    """The durable requests of one service.

    Attributes:
        address: of this service; None if it has no name, and so no such requests.
        serializer: what outcomes are kept with.
    """

    table: Table
    dialect: Dialect
    address: str | None
    serializer: str

    def note(self, connection: Connection, messages: Sequence[Message]) -> None:
        """Note those of *messages* that are durable requests, just written to the outbox.

        Another attempt at one, or what takes its place, asks in the name of the first. What a saga
        asks for it has written down itself.
        """
        for each in messages:
            if SAGA_HEADER in each.headers:
                continue
            if self.address and each.headers.get(REPLY_HEADER) == self.address:
                values = {"correlation_id": UUID(each.headers["id"]), "task": each.task}
                self.dialect.insert_once(connection, self.table, values, now="at")

    def record(self, connection: Connection, correlation_id: UUID, outcome: Any) -> bool:
        """Record the first *outcome*; returns False if there is one already.

        Raises:
            UnknownRequest: nobody here asked for it.
        """
        content_type, content_encoding, body = dumps(outcome, serializer=self.serializer)
        columns = self.table.c
        recorded = connection.execute(
            update(self.table)
            .where(columns.correlation_id == correlation_id, columns.replied_at.is_(None))
            .values(
                replied_at=self.dialect.now(),
                content_type=content_type,
                content_encoding=content_encoding,
                body=body.encode() if isinstance(body, str) else body,
            )
        ).rowcount
        if not recorded:
            self.outcome(connection, correlation_id)
        return bool(recorded)

    def outcome(self, connection: Connection, correlation_id: UUID) -> Any:
        """The outcome of a request; None as long as there is none.

        Raises:
            UnknownRequest: there is no such request.
        """
        found = self.outcomes(connection, [correlation_id])
        if correlation_id not in found:
            raise unknown_request(correlation_id)
        stored = found[correlation_id]
        return None if stored is None else stored.decode()

    def outcomes(
        self, connection: Connection, correlation_ids: Iterable[UUID]
    ) -> dict[UUID, StoredOutcome | None]:
        """The outcomes of those requests that there are; None for one without a reply."""
        columns = self.table.c
        rows = connection.execute(
            select(
                columns.correlation_id,
                columns.content_type,
                columns.content_encoding,
                columns.body,
            ).where(columns.correlation_id.in_(correlation_ids))
        )
        return {row.correlation_id: _from_row(row) for row in rows}


def _from_row(row: Row[Any]) -> StoredOutcome | None:
    if row.body is None:
        return None
    return StoredOutcome(row.content_type, row.content_encoding, bytes(row.body))


def unknown_request(correlation_id: UUID) -> UnknownRequest:
    """The error that says that there is no such request."""
    return UnknownRequest(
        f"No durable request {correlation_id} is known here. Was its transaction "
        "committed, in this database, and less than eda_request_retention ago?"
    )
