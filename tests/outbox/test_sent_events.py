"""Monitors learn of a call when its message is sent, and of none that is never sent."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from celery.events.event import get_exchange
from kombu import Queue

from celery_eda import EDA
from tests.support.databases import Database


class Shop:
    """An app whose monitoring events are collected."""

    def __init__(self, database: Database, **settings: Any) -> None:
        self.app = Celery(
            "shop",
            broker=f"memory://{uuid4()}",
            broker_transport_options={"polling_interval": 0},
            set_as_current=False,
        )
        self.app.conf.update(eda_send_after_commit=False, **settings)
        self.eda = EDA(self.app, engine=database.engine)

        @self.eda.task(name="shop.charge")
        def charge(order: int, card: str = "") -> None:
            """A call."""

        self.charge = charge
        self.seen()

    def seen(self) -> list[dict[str, Any]]:
        """The monitoring events since the last call."""
        with self.app.connection_for_read() as broker:
            queue = Queue("seen", get_exchange(broker), routing_key="#")
            simple, events = broker.SimpleQueue(queue), []
            while True:
                try:
                    message = simple.get(block=False)
                except simple.Empty:
                    return events
                message.ack()
                events.append(message.payload)


@pytest.fixture
def shop(database: Database) -> Shop:
    return Shop(database, task_send_sent_event=True)


def test_a_call_is_reported_when_it_is_sent(shop: Shop) -> None:
    with shop.eda.transaction():
        result = shop.charge.delay(7, card="visa")
    before = shop.seen()
    shop.eda.outbox.relay().drain()

    (event,) = shop.seen()
    assert before == []
    assert event["type"] == "task-sent"
    assert (event["uuid"], event["root_id"], event["name"]) == (result.id, result.id, "shop.charge")
    assert (event["args"], event["kwargs"], event["retries"]) == ("(7,)", "{'card': 'visa'}", 0)
    assert (event["queue"], event["routing_key"], event["exchange"]) == ("celery", "celery", "")


def test_the_report_has_the_fields_of_celerys_own(shop: Shop) -> None:
    shop.app.send_task("elsewhere.plain", (7,))
    (plain,) = shop.seen()
    with shop.eda.transaction():
        shop.app.send_task("elsewhere.plain", (7,))
    shop.eda.outbox.relay().drain()
    (captured,) = shop.seen()

    assert captured.keys() == plain.keys()
    differing = ("uuid", "root_id", "timestamp", "local_received", "clock")
    assert {k: v for k, v in captured.items() if k not in differing} == {
        k: v for k, v in plain.items() if k not in differing
    }


def test_a_call_that_is_rolled_back_is_not_reported(shop: Shop) -> None:
    with shop.eda.transaction() as session:
        shop.charge.delay(7)
        session.rollback()
    shop.eda.outbox.relay().drain()

    assert shop.seen() == []


def test_each_of_many_calls_is_reported_once(shop: Shop) -> None:
    with shop.eda.transaction():
        ids = [shop.charge.delay(number).id for number in range(250)]
    shop.eda.outbox.relay().drain()

    assert sorted(each["uuid"] for each in shop.seen()) == sorted(ids)


def test_emitted_events_are_not_reported_as_calls(shop: Shop) -> None:
    with shop.eda.transaction():
        shop.eda.emit("order.placed", {"order": 7})
    shop.eda.outbox.relay().drain()

    assert shop.seen() == []


def test_nothing_is_reported_unless_it_is_asked_for(database: Database) -> None:
    shop = Shop(database)
    with shop.eda.transaction():
        shop.charge.delay(7)
    shop.eda.outbox.relay().drain()

    assert shop.seen() == []


def test_a_report_that_fails_holds_up_no_message(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shop.eda.transaction():
        shop.charge.delay(7)
    monkeypatch.setattr(shop.app.events, "Dispatcher", lambda *_, **__: 1 / 0)
    done = shop.eda.outbox.relay().drain()

    assert done.confirmed == 1
    assert shop.seen() == []
