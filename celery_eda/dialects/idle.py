"""A connection that nobody has used for a while is asked whether it lives.

To ask before each use, as SQLAlchemy's ``pool_pre_ping`` does, costs each transaction a round trip.
A connection that was good a moment ago and is not now fails like any other outage, and whoever
uses it repeats its transaction or says so.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.exc import InvalidatePoolError

#: Seconds after which it is asked.
IDLE = 1.0
_LEFT = "celery_eda_left_at"


def ask(engine: Engine) -> None:
    """Have *engine* ask its connections; one that does not answer makes it drop them all."""

    @event.listens_for(engine, "checkin")
    def leave(dbapi_connection: Any, record: Any) -> None:
        record.info[_LEFT] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def use(dbapi_connection: Any, record: Any, proxy: Any) -> None:
        left = record.info.pop(_LEFT, None)
        if left is None or time.monotonic() - left < IDLE:
            return
        try:
            engine.dialect.do_ping(dbapi_connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error
