"""Two services that share one outbox: each sends its own messages, to its own broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from celery import Celery
from sqlalchemy import update

from celery_eda import EDA
from celery_eda.core.message import Message
from celery_eda.outbox.housekeeping import warn_of_abandoned
from celery_eda.outbox.store import ABANDONED, OutboxStore
from tests.support.databases import Database
from tests.support.messages import message


def taken(database: Database, outbox: OutboxStore) -> list[str]:
    """The tasks of the messages that a relay of the service claims."""
    with database.engine.connect() as connection:
        claimed = outbox.claim(connection, "relay", 10)
        outbox.clear(connection, "relay", [each.id for each in claimed])
        connection.commit()
    return [each.message.task for each in claimed]


def soon(name: str) -> Message:
    return message(name)


def delayed(name: str) -> Message:
    return replace(message(name), due=datetime.now(timezone.utc) - timedelta(seconds=5))


@pytest.mark.parametrize("make", [soon, delayed])
def test_a_relay_takes_the_messages_of_its_service_only(
    database: Database, outbox: OutboxStore, make: Callable[[str], Message]
) -> None:
    shop, stock = replace(outbox, service="shop"), replace(outbox, service="stock")
    with database.engine.begin() as connection:
        for store, name in ((shop, "a"), (stock, "b"), (outbox, "of nobody")):
            store.add(connection, [make(name)])

    assert sorted(taken(database, stock)) == ["b", "of nobody"]
    assert taken(database, shop) == ["a"]


@pytest.fixture
def services(shared_database: Database) -> Iterator[tuple[EDA, EDA]]:
    """Two services on one database."""
    apps = [Celery(name, broker="memory://", set_as_current=False) for name in ("shop", "stock")]
    for app in apps:
        app.conf.eda_send_after_commit = False
    shop, stock = (EDA(app, engine=shared_database.engine) for app in apps)
    yield shop, stock
    with shared_database.engine.begin() as connection:
        connection.execute(shared_database.tables.outbox.delete())


def test_messages_of_another_service_are_left_and_reported_after_a_while(
    services: tuple[EDA, EDA], caplog: pytest.LogCaptureFixture
) -> None:
    shop, stock = services
    with stock.transaction():
        stock.service.app.send_task("count")
    relay = shop.outbox.relay()
    left = relay.drain()
    table = stock.databases.tables.outbox
    warn_of_abandoned(relay.engine, relay.outbox)
    early = caplog.text
    with stock.databases.engine.begin() as connection:
        long_ago = stock.databases.dialect.later(-2 * ABANDONED)
        connection.execute(update(table).values(created_at=long_ago))
    warn_of_abandoned(relay.engine, relay.outbox)
    sent = stock.outbox.relay().drain()

    assert (left.claimed, sent.confirmed) == (0, 1)
    assert early == ""
    assert "messages of the service 'stock' wait in the outbox of 'shop'" in caplog.text
