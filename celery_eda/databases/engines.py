"""Engines with time-outs, safe to use after a fork."""

from __future__ import annotations

from functools import partial

from sqlalchemy import URL, Engine, create_engine

from celery_eda.core.forks import on_fork
from celery_eda.databases.dialect import Dialect


def create(url: URL, dialect: Dialect, timeout: float) -> Engine:
    """An engine on which the database ends a transaction that stalls.

    Each worker slot and each relay uses one connection, which bounds their number.

    Args:
        url: of the database.
        dialect: of the database.
        timeout: seconds that a transaction may wait for anything but the database.
    """
    engine = create_engine(url, max_overflow=-1, **dialect.engine_options(timeout))
    dialect.configure_engine(engine, timeout)
    return forkable(engine)


def forkable(engine: Engine) -> Engine:
    """*engine*, which from now on opens connections of its own in every forked child."""
    on_fork(partial(engine.dispose, close=False))
    return engine
