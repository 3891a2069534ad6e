"""Engines with time-outs, safe to use after a fork."""

from __future__ import annotations

from functools import partial
from typing import Any

from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.pool import QueuePool

from celery_eda.core.forks import on_fork
from celery_eda.databases.dialect import Dialect


def create(url: URL, dialect: Dialect, timeout: float, like: Engine | None = None) -> Engine:
    """An engine on which the database ends a transaction that stalls.

    Each worker slot and each relay uses one connection, which bounds their number.

    Args:
        url: of the database.
        dialect: of the database.
        timeout: seconds that a transaction may wait for anything but the database.
        like: an engine of the user, whose way to connect is taken over: its ``creator``, its
            ``connect_args``, its listeners.
    """
    options = dialect.engine_options(timeout)
    if like is not None:
        options |= {"creator": partial(_connect_like, like), "poolclass": QueuePool}
    engine = create_engine(url, max_overflow=-1, **options)
    dialect.configure_engine(engine, timeout)
    return forkable(engine)


def _connect_like(engine: Engine) -> Any:
    """A connection of the driver, made as *engine* makes its own, and not one of its pool."""
    connection = engine.pool.recreate().connect()
    made = connection.dbapi_connection
    connection.detach()
    return made


def forkable(engine: Engine) -> Engine:
    """*engine*, which from now on opens connections of its own in every forked child."""
    on_fork(partial(engine.dispose, close=False))
    return engine


def is_same_database(one: Engine, other: Engine) -> bool:
    """True if both engines connect to one database as one user."""

    def address(engine: Engine) -> tuple[Any, ...]:
        url = engine.url
        return url.get_backend_name(), url.host, url.port, url.database, url.username

    return one.pool is other.pool or (bool(one.url.database) and address(one) == address(other))
