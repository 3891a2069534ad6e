"""A message as columns of a table: the outbox, parked messages and dead letters share them.

What is read from a row equals what was written to it, dates and UUIDs in headers included.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from json import loads
from typing import Any

from kombu.utils import json
from sqlalchemy import Row

from celery_eda.core.identity import Identity
from celery_eda.core.message import Encoded, Message

#: The key under which kombu writes the type of a value that JSON does not have.
_TYPE = '"__type__"'


def to_row(message: Message) -> dict[str, Any]:
    """The columns of *message*; ``delay`` is in seconds from now, None to send it at once."""
    headers, properties = json_of(message)
    return {
        "message_id": message.identity.id,
        "revision": message.identity.revision,
        "task": message.task,
        "queue": message.queue,
        "exchange": message.exchange,
        "routing_key": message.routing_key,
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        "headers": headers,
        "properties": properties,
        "body": message.body,
        "preparation": json.dumps(message.prerequisites) if message.prerequisites else None,
        "delay": _seconds_until(message.due),
    }


def from_row(row: Row[Any]) -> Message:
    """The message in *row*, as it was captured."""
    return Message.from_fields(
        {
            "identity": Identity(row.message_id, row.revision),
            "task": row.task,
            "body": bytes(row.body),
            "content_type": row.content_type,
            "content_encoding": row.content_encoding,
            "headers": _loads(row.headers),
            "properties": _loads(row.properties),
            "exchange": row.exchange,
            "routing_key": row.routing_key,
            "queue": row.queue,
            "prerequisites": read_prerequisites(row.preparation),
            "encoded": Encoded(row.headers, row.properties, getattr(row, "envelope", None)),
        }
    )


def read_prerequisites(text: str | None) -> tuple[tuple[str, Any], ...]:
    """Calls on the result backend, each a name and its arguments, from the column *text*."""
    if text is None:
        return ()
    return tuple((name, arguments) for name, arguments in json.loads(text))


def _loads(text: str) -> dict[str, Any]:
    # A hook makes reading slow, and only texts with types need one.
    hook = _typed if _TYPE in text else None
    read: dict[str, Any] = loads(text, object_hook=hook)
    return read


def json_of(message: Message) -> tuple[str, str]:
    """Headers and properties of *message*, each as JSON text."""
    if message.encoded:
        return message.encoded.headers, message.encoded.properties
    return _dumps(message.headers), _dumps(message.properties)


def _dumps(mapping: Mapping[str, Any]) -> str:
    return str(json.dumps(dict(mapping)))


def _typed(value: dict[str, Any]) -> Any:
    """The date, UUID or the like that kombu wrote as *value*, or *value* if it is none."""
    try:
        return json.object_hook(value)
    except Exception:  # a user's dictionary with such a key
        return value


def _seconds_until(due: datetime | None) -> float | None:
    """Seconds from now until *due*, both by this machine's clock, so that its error cancels out.

    The database adds them to its own clock when the row is written.
    """
    if due is None:
        return None
    return max(0.0, (due - datetime.now(timezone.utc)).total_seconds())
