"""The queues of celery_eda that a worker consumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import TestWorkController, start_worker
from kombu import Queue
from kombu.transport import memory
from sqlalchemy.orm import Session

from celery_eda import EDA
from celery_eda.core.event import Event
from celery_eda.databases import upgrade

PATIENCE = 120.0


class Shop:
    """An app whose broker is this process's memory, and whose relay is called by the test."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.app = Celery("shop", broker="memory://", set_as_current=False)
        self.app.conf.update(
            eda_database_url=f"sqlite:///{folder / 'shop.db'}",
            eda_embedded_relay=False,
            eda_send_after_commit=False,
            **settings,
        )
        self.eda = EDA(self.app)
        self.handled: list[str] = []
        upgrade.upgrade(self.eda.databases.engine, self.eda.databases.tables)

        @self.eda.task(name="shop.handle")
        def handle(session: Session, name: str) -> None:
            self.handled.append(name)

        self.handle = handle

    def relay(self) -> None:
        """Send all that is stored."""
        self.eda.outbox.relay().drain()

    def until(self, condition: Callable[[], Any]) -> None:
        until = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.02)


@pytest.fixture
def make_shop(tmp_path: Path) -> Iterator[Callable[..., Shop]]:
    shops: list[Shop] = []

    def make(**settings: Any) -> Shop:
        shops.append(Shop(tmp_path, **settings))
        return shops[-1]

    yield make
    for shop in shops:
        shop.eda.databases.engine.dispose()
    memory.Transport.global_state.clear()
    memory.Channel.queues.clear()


@contextmanager
def worker(app: Celery, *queues: str) -> Iterator[TestWorkController]:
    options = {"queues": queues} if queues else {}
    with start_worker(app, perform_ping_check=False, shutdown_timeout=30.0, **options) as started:
        yield started


def test_an_app_that_creates_no_missing_queues_has_ours_all_the_same(
    make_shop: Callable[..., Shop],
) -> None:
    shop = make_shop(task_create_missing_queues=False, task_queues=[Queue("celery")])

    @shop.eda.repairs(shop.handle)
    def mend(failure: Any) -> None:
        shop.handled.append("mended")

    with worker(shop.app):
        with shop.eda.transaction():
            shop.app.send_task("shop.handle.repair", (1,), queue="eda.repair")
            shop.handle.delay("handled")
        shop.relay()
        shop.until(lambda: "handled" in shop.handled)

    assert shop.app.amqp.queues["eda.replies.shop"].name == "eda.replies.shop"
    with pytest.raises(KeyError):
        shop.app.amqp.queues["other"]


@pytest.mark.parametrize(
    "settings",
    [
        {"task_default_queue_type": "quorum"},
        {"task_create_missing_queue_type": "quorum"},
        {"task_queues": [Queue("celery", queue_arguments={"x-queue-type": "quorum"})]},
        {"task_queues": {"celery": {"queue_arguments": {"x-queue-type": "quorum"}}}},
    ],
)
def test_our_queues_are_quorum_queues_where_the_app_has_quorum_queues(
    make_shop: Callable[..., Shop], settings: dict[str, Any]
) -> None:
    shop = make_shop(eda_delivery_limit=20, **settings)

    @shop.eda.on("order.*")
    def listen(session: Session, event: Event) -> None: ...

    queues = shop.app.amqp.queues
    (subscription,) = shop.eda.events.subscriptions.known.values()
    ours = [
        queues["eda.replies.shop"],
        queues["eda.repair"],
        shop.eda.events.queues.queue_of(subscription),
    ]

    assert {each.queue_arguments["x-queue-type"] for each in ours} == {"quorum"}
    assert {each.queue_arguments["x-dead-letter-routing-key"] for each in ours} == {"shop"}


def test_our_queues_are_classic_where_the_app_has_classic_queues(
    make_shop: Callable[..., Shop],
) -> None:
    assert not make_shop().app.amqp.queues["eda.replies.shop"].queue_arguments
