"""Statements larger than a packet of MariaDB may be.

The server closes the connection, so that such a statement looks like an outage of the server.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import Engine, ExceptionContext, event

from celery_eda.errors import StatementTooLarge

#: Key in a connection's info: the most bytes of a packet.
_LIMIT = "celery_eda_max_allowed_packet"
#: Escaping makes a value at most so many times as long.
ESCAPING = 2


def explain_refusals(engine: Engine) -> None:
    """Install the listeners on *engine* that raise ``StatementTooLarge`` for such a statement."""

    @event.listens_for(engine, "connect")
    def ask_limit(dbapi_connection: Any, record: Any) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute("SELECT @@max_allowed_packet")
        record.info[_LIMIT] = cursor.fetchone()[0]
        cursor.close()

    @event.listens_for(engine, "handle_error")
    def explain(context: ExceptionContext) -> StatementTooLarge | None:
        limit = context.connection and context.connection.info.get(_LIMIT)
        if not limit or (size := _size(context, limit)) < limit:
            return None
        context.is_disconnect = True  # whether the driver has read the refusal or not
        return StatementTooLarge(
            f"A statement of {size} bytes is larger than max_allowed_packet of the server ({limit} "
            "bytes), which has closed the connection. Raise max_allowed_packet there, or keep "
            "large values out of messages and send a reference to them."
        )


def _size(context: ExceptionContext, limit: int) -> int:
    """Bytes of the largest statement that the driver sent; 0 if all are far below *limit*."""
    execution: Any = context.execution_context
    mogrify = getattr(execution and execution.cursor, "mogrify", None)
    if mogrify is None:
        return 0
    text = context.statement or ""
    return max(
        (len(_encoded(mogrify(text, row))) for row in _large_rows(context, limit)), default=0
    )


def _large_rows(context: ExceptionContext, limit: int) -> Iterator[Any]:
    """The parameters that may make a statement larger than *limit*."""
    given: Any = context.parameters
    for row in given if isinstance(given, list) else [given]:
        values = row.values() if isinstance(row, Mapping) else row or ()
        size = sum(len(_encoded(each)) for each in values if isinstance(each, str | bytes))
        if ESCAPING * size >= limit / 2:
            yield row


def _encoded(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode(errors="surrogateescape")
