"""Names of services on Redis: for each a key with its owner, which expires."""

from __future__ import annotations

from typing import Any

from kombu import Connection
from redis.exceptions import ResponseError

from celery_eda.core import redaction

log = redaction.logger(__name__)

#: Beginning of the names of the keys.
PREFIX = "eda.service."


def hold(connection: Connection, name: str, owner: str, expires: float) -> bool:
    """Hold *name* for *owner* during the next *expires* seconds; False if another one holds it."""
    with connection.channel() as channel, channel.conn_or_acquire() as client:
        try:
            return _hold(client, PREFIX + name, owner, int(expires * 1000))
        except ResponseError as error:
            log.warning(
                "the broker does not let this service hold its name %s: %s. Workers of another "
                "service of that name are not noticed. Permit the worker's user to write the keys "
                "%s*.",
                name,
                error,
                PREFIX,
            )
            return True


def _hold(client: Any, key: str, owner: str, milliseconds: int) -> bool:
    if client.set(key, owner, nx=True, px=milliseconds):
        return True
    if client.get(key) not in (None, owner.encode()):
        return False
    client.set(key, owner, px=milliseconds)
    return True
