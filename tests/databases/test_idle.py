"""Connections of the pool that have died while nobody used them."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import OperationalError

from celery_eda.databases import ping
from tests.support.databases import LOCKING, Database

on_servers = pytest.mark.parametrize("empty_database", LOCKING, indirect=True)


def cut(engine: Engine) -> None:
    """Have the server end the one connection that *engine* has idle."""
    own = "pg_backend_pid()" if engine.name == "postgresql" else "connection_id()"
    with engine.connect() as connection:
        number = connection.scalar(text(f"SELECT {own}"))
    kill = f"SELECT pg_terminate_backend({number})"
    if engine.name != "postgresql":
        kill = f"KILL {number}"
    positional, named = engine.dialect.create_connect_args(engine.url)
    raw = engine.dialect.connect(*positional, **named)
    cursor = raw.cursor()
    cursor.execute(kill)
    raw.commit()
    raw.close()
    time.sleep(0.1)  # the server does it when it comes to it


@on_servers
def test_one_that_was_idle_for_long_is_replaced_unseen(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ping, "IDLE", 0.0)
    cut(empty_database.engine)

    with empty_database.engine.connect() as connection:
        assert connection.scalar(select(1)) == 1


@on_servers
def test_one_that_was_used_a_moment_ago_fails_like_any_outage(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ping, "IDLE", 60.0)
    cut(empty_database.engine)

    with pytest.raises(OperationalError) as failure, empty_database.engine.connect() as connection:
        connection.scalar(select(1))
    assert empty_database.dialect.is_outage(failure.value)
    with empty_database.engine.connect() as connection:
        assert connection.scalar(select(1)) == 1
