"""Pooled connections are pinged before use if they have been idle.

SQLAlchemy's ``pool_pre_ping`` pings before each use, which costs every transaction a round trip. A
connection that was used a moment ago and has broken since fails like any other outage, and its
transaction is repeated or raises.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.exc import InvalidatePoolError

#: Seconds without use after which a connection is pinged.
IDLE = 1.0
_RETURNED = "celery_eda_left_at"


def ping_idle_connections(engine: Engine) -> None:
    """Install the ping on *engine*; a connection that fails it invalidates the whole pool."""

    @event.listens_for(engine, "checkin")
    def on_checkin(dbapi_connection: Any, record: Any) -> None:
        record.info[_RETURNED] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def on_checkout(dbapi_connection: Any, record: Any, proxy: Any) -> None:
        returned = record.info.pop(_RETURNED, None)
        if returned is None or time.monotonic() - returned < IDLE:
            return
        try:
            engine.dialect.do_ping(dbapi_connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error
