"""Durable requests and their outcomes, stored in the requester's own database.

A request is recorded in the transaction that publishes it, and its outcome in the transaction that
handles the reply. So a reply without a request is recognised and refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from kombu.serialization import dumps, loads, prepare_accept_content
from sqlalchemy import Connection, Row, Table, select, update

from celery_eda.core.addresses import REPLY_HEADER, SAGA_HEADER
from celery_eda.core.message import Message
from celery_eda.databases import Dialect, Retention
from celery_eda.errors import UnknownRequest


@dataclass(frozen=True)
class StoredOutcome:
    """An encoded outcome, with what is needed to decode it."""

    content_type: str
    content_encoding: str
    body: bytes

    def decode(self, serializer: str) -> Any:
        """``{"result": …}`` or ``{"error": …}``, as the responder sent it.

        Raises:
            ContentDisallowed: it is neither JSON nor written by *serializer*. A decoder may run
                code, and not everybody who may write a row may run code here.
        """
        accept = prepare_accept_content([serializer, "json"])
        return loads(self.body, self.content_type, self.content_encoding, accept=accept)


@dataclass(frozen=True)
class RequestStore:
    """The durable requests of one service.

    Attributes:
        address: of this service; None if it has no name, and so no durable requests.
        serializer: encodes outcomes from now on; only such outcomes, and JSON, are decoded.
    """

    table: Table
    dialect: Dialect
    address: str | None
    serializer: str

    def retention(self, seconds: float | None) -> Retention:
        """Requests may be deleted after *seconds*, replied to or not."""
        return Retention("requests", self.table, self.dialect, seconds)

    def add(self, connection: Connection, messages: Sequence[Message]) -> None:
        """Record the durable requests among *messages*, which this transaction publishes.

        A retry or a replacement has the correlation id of the first attempt, so it adds no row.
        Requests of sagas are recorded by the saga itself.
        """
        for each in messages:
            if SAGA_HEADER in each.headers:
                continue
            if self.address and each.headers.get(REPLY_HEADER) == self.address:
                values = {"correlation_id": UUID(each.headers["id"]), "task": each.task}
                self.dialect.insert_once(connection, self.table, values, now="at")

    def record(self, connection: Connection, correlation_id: UUID, outcome: Any) -> bool:
        """Record the first *outcome* of a request; returns False if it has one already.

        It is ``{"result": …}`` or ``{"error": …}``, as the responder sent it.

        Raises:
            UnknownRequest: this service has made no such request.
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
        """The outcome of one request; None until the reply has arrived.

        Raises:
            UnknownRequest: this service has made no such request.
        """
        found = self.outcomes(connection, [correlation_id])
        if correlation_id not in found:
            raise unknown_request(correlation_id)
        stored = found[correlation_id]
        return None if stored is None else stored.decode(self.serializer)

    def outcomes(
        self, connection: Connection, correlation_ids: Iterable[UUID]
    ) -> dict[UUID, StoredOutcome | None]:
        """The outcomes by correlation id; None until the reply has arrived.

        Unknown requests are missing from the result.
        """
        columns = self.table.c
        rows = connection.execute(
            select(*(columns[name] for name in _OUTCOME)).where(
                columns.correlation_id.in_(correlation_ids)
            )
        )
        return {row.correlation_id: _from_row(row) for row in rows}


_OUTCOME = ("correlation_id", "content_type", "content_encoding", "body")


def _from_row(row: Row[Any]) -> StoredOutcome | None:
    if row.body is None:
        return None
    return StoredOutcome(row.content_type, row.content_encoding, bytes(row.body))


def unknown_request(correlation_id: UUID) -> UnknownRequest:
    """The error for a *correlation_id* without a request."""
    return UnknownRequest(
        f"No durable request {correlation_id} is known here. Was its transaction "
        "committed, in this database, and less than eda_request_retention ago?"
    )
