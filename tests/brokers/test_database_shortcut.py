"""Where the service's own database is the broker, a transaction puts its messages into queues."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import Exchange, Queue
from sqlalchemy import Table, delete, func, select

from celery_eda import EDA
from celery_eda.core import context
from celery_eda.databases import upgrade
from tests.support.brokers import Broker


@pytest.fixture(params=["eda_sqlite", "eda_postgresql"])
def broker(request: pytest.FixtureRequest) -> Broker:
    """Every database that can be a broker."""
    found: Broker = request.getfixturevalue(f"{request.param}_broker")
    return found


def service(broker: str, database: str, **conf: Any) -> EDA:
    app = Celery("shop", broker=broker, set_as_current=False)
    news = Queue("news", Exchange("news", type="topic"), routing_key="#")
    app.conf.update(
        eda_database_url=database,
        eda_send_after_commit=False,
        task_default_queue="letters",
        task_queues=[Queue("letters"), news],
        **conf,
    )
    eda = EDA(app)
    eda.task(name="shop.charge")(charge)
    upgrade.upgrade(eda.databases.engine, eda.databases.tables)
    return eda


def charge(number: int) -> int:
    return number


@pytest.fixture
def eda(broker: Broker) -> Iterator[EDA]:
    """A service whose database is its broker."""
    eda = service(broker.url, broker.url.removeprefix("eda+"))
    yield eda
    eda.databases.engine.dispose()
    eda.databases.relay_engine.dispose()


def number(eda: EDA, table: Table) -> int:
    with eda.databases.engine.connect() as connection:
        return int(connection.scalar(select(func.count()).select_from(table)) or 0)


def found(eda: EDA) -> tuple[int, int]:
    """How many messages are in queues, and how many in the outbox."""
    return number(eda, eda.databases.tables.queue), number(eda, eda.databases.tables.outbox)


def send(eda: EDA, *numbers: int, **options: Any) -> None:
    for each in numbers:
        eda.service.app.tasks["shop.charge"].apply_async((each,), **options)


def test_a_message_is_in_its_queue_once_its_transaction_is_committed(eda: EDA) -> None:
    with eda.transaction():
        send(eda, 1, 2, 3)

        assert found(eda) == (0, 0)

    assert found(eda) == (3, 0)


def test_what_is_rolled_back_is_in_no_queue(eda: EDA) -> None:
    with eda.transaction() as session:
        send(eda, 1)
        session.flush()
        session.rollback()

    assert found(eda) == (0, 0)


def test_a_savepoint_takes_only_its_own_messages_back(eda: EDA) -> None:
    with eda.transaction() as session:
        send(eda, 1)
        with session.begin_nested() as savepoint:
            send(eda, 2)
            savepoint.rollback()

    assert found(eda) == (1, 0)


def test_a_message_published_outside_any_transaction_is_put_there_too(eda: EDA) -> None:
    send(eda, 1)

    assert found(eda) == (1, 0)


def test_the_next_attempt_of_a_retry_policy_waits_in_its_queue_too(eda: EDA) -> None:
    """Its headers hold no eta: only the message itself knows when it is due."""
    send(eda, 1, countdown=600)
    with eda.databases.engine.begin() as connection:
        row = connection.execute(select(eda.databases.tables.queue)).one()
        connection.execute(delete(eda.databases.tables.queue))
    with context.scope_of(collected := context.Collected()):
        send(eda, 1)
    [message] = collected.messages
    due = datetime.now(timezone.utc) + timedelta(hours=1)
    eda.outbox.writer.write_now([replace(message, due=due)])

    with eda.databases.engine.connect() as connection:
        retry = connection.execute(select(eda.databases.tables.queue)).one()
    assert found(eda) == (1, 0)
    assert retry.owner == row.owner
    assert retry.due is not None
    assert retry.due > row.due


def test_a_delayed_message_waits_in_its_queue(eda: EDA) -> None:
    send(eda, 1, countdown=600)

    with eda.databases.engine.connect() as connection:
        row = connection.execute(select(eda.databases.tables.queue)).one()
    assert (row.owner, row.due is None) == (0, False)
    assert found(eda) == (1, 0)


def test_a_message_that_an_exchange_has_to_route_goes_through_the_outbox(eda: EDA) -> None:
    with eda.transaction():
        send(eda, 1)
        send(eda, 2, exchange="news", routing_key="order.placed")
    assert found(eda) == (1, 1)

    eda.outbox.relay().drain()

    assert found(eda) == (2, 0)


def test_a_broker_that_is_another_database_is_sent_to_by_a_relay(
    broker: Broker, tmp_path: Path
) -> None:
    eda = service(broker.url, f"sqlite:///{tmp_path}/own.db")

    send(eda, 1)

    assert found(eda) == (0, 1)
    assert eda.outbox.relay().drain().confirmed == 1
    assert len(broker.empty("letters")) == 1


def test_the_broker_has_the_tables_that_the_settings_name(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/shop.db"
    eda = service(f"eda+{database}", database, eda_table_prefix="shop_")

    send(eda, 1)

    with eda.service.app.connection_for_read() as connection:
        taken = connection.default_channel.basic_get("letters", no_ack=True)
    assert taken.headers["task"] == "shop.charge"
    assert found(eda) == (0, 0)


def test_no_connection_is_made_that_the_transaction_does_not_have(eda: EDA) -> None:
    with eda.transaction():
        send(eda, 1)

    broker = eda.service.app.connection_for_write().transport.broker
    assert broker.engine.pool.checkedin() == broker.engine.pool.checkedout() == 0
