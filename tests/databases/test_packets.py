"""A statement larger than MariaDB accepts is no outage: the error gives the reason."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from celery_eda.databases.mysql import MySQL
from celery_eda.errors import StatementTooLarge
from tests.support.databases import connect
from tests.support.worker_slot import Slot

on_mariadb = pytest.mark.parametrize("shared_database", ["mariadb"], indirect=True)
#: More than the default of ``max_allowed_packet``, 16 MB.
TOO_LARGE = 17 * 2**20
#: Less, but escaping makes it longer.
QUOTES = '"' * (9 * 2**20)


@pytest.mark.parametrize("value", ["x" * TOO_LARGE, b"x" * TOO_LARGE, QUOTES])
@pytest.mark.parametrize("own", [True, False], ids=["own engine", "given engine"])
def test_a_value_that_is_too_large_is_reported(mariadb_url: str, value: Any, own: bool) -> None:
    if own:
        engine = connect("mariadb", mariadb_url).engine
    else:
        engine = create_engine(mariadb_url)
        MySQL().watch(engine)
    with engine.connect() as connection, pytest.raises(StatementTooLarge) as raised:
        connection.execute(text("SELECT LENGTH(:value)"), {"value": value})
    with engine.connect() as connection:
        again = connection.scalar(text("SELECT LENGTH(:value)"), {"value": "x" * 2**20})

    assert "max_allowed_packet" in str(raised.value)
    assert again == 2**20
    engine.dispose()


def test_a_connection_that_is_lost_is_reported_as_ever(mariadb_url: str) -> None:
    engine = connect("mariadb", mariadb_url).engine
    with engine.connect() as victim, engine.connect() as killer:
        killer.execute(text(f"KILL {victim.scalar(text('SELECT CONNECTION_ID()'))}"))
        with pytest.raises(OperationalError):
            victim.execute(text("SELECT LENGTH(:value)"), {"value": "x" * 9 * 2**20})
    engine.dispose()


@on_mariadb
def test_a_producer_learns_the_reason(slot: Slot) -> None:
    @slot.task
    def mail(letter: str) -> None:
        """Never runs."""

    with pytest.raises(StatementTooLarge, match="max_allowed_packet"), slot.eda.transaction():
        mail.delay(QUOTES)

    assert slot.sent() == []


@on_mariadb
def test_a_handler_whose_message_cannot_be_stored_fails_at_once(slot: Slot) -> None:
    @slot.task
    def mail(letter: str) -> None:
        """Never runs."""

    @slot.task
    def write_long() -> None:
        slot.write(7)
        mail.delay(QUOTES)

    write_long.delay()
    (message,) = slot.sent()
    ending = slot.deliver(message)

    assert isinstance(ending, StatementTooLarge)
    assert [(row.reason, row.error_type) for row in slot.dead()] == [
        ("failed", "StatementTooLarge")
    ]
    assert "max_allowed_packet" in slot.dead()[0].error
    assert slot.effects() == []
