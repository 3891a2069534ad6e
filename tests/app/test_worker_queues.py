"""The queues of a worker: those that lose messages, those of celery_eda, and the option -Q."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import TestWorkController, start_worker
from kombu import Exchange, Queue
from kombu.common import Broadcast
from kombu.transport import memory
from sqlalchemy.orm import Session

from celery_eda import EDA
from celery_eda.core.event import Event
from celery_eda.databases import upgrade
from celery_eda.errors import ConfigurationError, UnsafeQueue

PATIENCE = 120.0


class Shop:
    """An app whose broker is this process's memory, and whose relay is called by the test."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.app = Celery("shop", set_as_current=False)
        self.app.conf.update(
            broker_url=settings.pop("broker_url", "memory://"),
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


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """What is logged; a worker takes the root logger for itself, and gives it back here."""
    root, ours = logging.getLogger(), logging.getLogger("celery_eda")
    level, handlers = root.level, list(root.handlers)
    heard: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]
    ours.addHandler(handler)
    ours.setLevel(logging.WARNING)
    yield heard
    ours.removeHandler(handler)
    ours.setLevel(logging.NOTSET)
    root.setLevel(level)
    root.handlers[:] = handlers


@contextmanager
def worker(app: Celery, *queues: str) -> Iterator[TestWorkController]:
    options = {"queues": queues} if queues else {}
    with start_worker(app, perform_ping_check=False, shutdown_timeout=30.0, **options) as started:
        yield started


def warnings(records: list[logging.LogRecord]) -> list[str]:
    return [each.getMessage() for each in records if each.levelno == logging.WARNING]


def test_an_app_that_creates_no_missing_queues_has_ours_all_the_same(
    make_shop: Callable[..., Shop],
) -> None:
    shop = make_shop(task_create_missing_queues=False, task_queues=[Queue("celery")])

    @shop.eda.repairs(shop.handle)
    def mend(failure: Any) -> None:
        shop.handled.append("mended")

    with worker(shop.app):
        with shop.eda.transaction():
            shop.app.send_task("shop.handle.repair", (1,), queue="eda.repair.shop")
            shop.handle.delay("handled")
        shop.relay()
        shop.until(lambda: "handled" in shop.handled)

    assert shop.app.amqp.queues["eda.replies.shop"].name == "eda.replies.shop"
    with pytest.raises(KeyError):
        shop.app.amqp.queues["other"]


def test_the_own_queue_of_a_repairer_exists_though_the_app_creates_no_missing_queues(
    make_shop: Callable[..., Shop],
) -> None:
    shop = make_shop(task_create_missing_queues=False, task_queues=[Queue("celery")])

    @shop.eda.task(name="shop.fail")
    def fail() -> None:
        raise ValueError

    @shop.eda.repairs(fail, queue="mending")
    def mend(failure: Any) -> None:
        shop.handled.append("mended")

    with worker(shop.app):
        with shop.eda.transaction():
            fail.delay()

        def mended() -> bool:
            shop.relay()
            return "mended" in shop.handled

        shop.until(mended)


def test_a_worker_with_a_repairer_of_a_plain_task_does_not_start(
    make_shop: Callable[..., Shop],
) -> None:
    shop = make_shop(eda_tasks=["shop.named"])

    @shop.app.task(name="shop.plain")
    def plain() -> None: ...

    @shop.app.task(name="shop.named")
    def named() -> None: ...

    for name in ("shop.plain", "shop.named", "shop.handle", "elsewhere.task"):

        @shop.eda.repairs(name)
        def mend(failure: Any) -> None: ...

    with pytest.raises(ConfigurationError, match=r"of plain tasks: shop\.plain\. "):
        TestWorkController(shop.app, pool="solo")


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
        queues["eda.repair.shop"],
        shop.eda.events.queues.queue_of(subscription),
    ]

    assert {each.queue_arguments["x-queue-type"] for each in ours} == {"quorum"}
    assert {each.queue_arguments["x-dead-letter-routing-key"] for each in ours} == {"shop"}


def test_our_queues_are_classic_where_the_app_has_classic_queues(
    make_shop: Callable[..., Shop],
) -> None:
    assert not make_shop().app.amqp.queues["eda.replies.shop"].queue_arguments


UNSAFE = [
    (Queue("q", no_ack=True), "no_ack"),
    (Queue("q", message_ttl=1.0), "message_ttl"),
    (Queue("q", queue_arguments={"x-message-ttl": 1000}), "message_ttl"),
    (Queue("q", max_length=1), "max_length"),
    (Queue("q", queue_arguments={"x-max-length-bytes": 1}), "max_length"),
    (Queue("q", expires=60.0), "expires"),
    (Queue("q", durable=False), "not durable"),
    (Queue("q", auto_delete=True), "not durable"),
    (Queue("q", Exchange("q", delivery_mode=1)), "delivery_mode"),
]


@pytest.mark.parametrize(("queue", "reason"), UNSAFE)
def test_a_worker_warns_of_a_queue_that_loses_messages(
    make_shop: Callable[..., Shop], records: list[logging.LogRecord], queue: Queue, reason: str
) -> None:
    shop = make_shop(task_queues=[queue])

    with worker(shop.app):
        pass

    (warning,) = [each for each in warnings(records) if "can lose messages" in each]
    assert "the queue q " in warning
    assert reason in warning


SAFE = [
    Queue("q"),
    Queue("q", max_length=1, queue_arguments={"x-overflow": "reject-publish"}),
    Queue("q", message_ttl=1.0, queue_arguments={"x-dead-letter-exchange": "x"}),
]


@pytest.mark.parametrize("queue", SAFE)
def test_a_worker_does_not_warn_of_a_queue_that_keeps_messages(
    make_shop: Callable[..., Shop], records: list[logging.LogRecord], queue: Queue
) -> None:
    with worker(make_shop(task_queues=[queue]).app):
        pass

    assert warnings(records) == []


@pytest.mark.parametrize("again", [False, True])
def test_a_reliable_task_is_not_called_by_way_of_a_queue_that_forgets_what_it_delivers(
    make_shop: Callable[..., Shop], again: bool
) -> None:
    shop = make_shop(task_queues=[Queue("celery"), Queue("q", no_ack=True)])
    if again:
        with pytest.raises(UnsafeQueue):
            shop.handle.apply_async(("x",), queue="q")

    with pytest.raises(UnsafeQueue, match="no_ack"), shop.eda.transaction():
        shop.handle.apply_async(("x",), queue="q")


def test_a_reliable_task_is_not_called_by_way_of_a_broadcast(
    make_shop: Callable[..., Shop], records: list[logging.LogRecord]
) -> None:
    shop = make_shop(
        task_queues=[Queue("celery"), Broadcast("everyone")],
        task_routes={"shop.handle": {"queue": "everyone"}},
    )

    with pytest.raises(UnsafeQueue, match="every_worker"), shop.eda.transaction():
        shop.handle.delay("x")
    with worker(shop.app):
        pass

    (warning,) = warnings(records)
    assert "shop.handle" in warning
    assert "broadcast everyone" in warning


def test_a_plain_task_is_called_by_way_of_any_queue(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop(task_queues=[Queue("celery"), Queue("q", no_ack=True), Broadcast("everyone")])

    with shop.eda.transaction():
        shop.app.send_task("shop.plain", queue="q")
        shop.app.send_task("shop.plain", queue="everyone")


def test_with_the_option_q_a_worker_warns_of_the_queues_that_it_leaves_out(
    make_shop: Callable[..., Shop], records: list[logging.LogRecord]
) -> None:
    shop = make_shop()

    @shop.eda.on("order.*", name="shop.listen")
    def listen(session: Session, event: Event) -> None: ...

    @shop.eda.repairs(shop.handle)
    def mend(failure: Any) -> None: ...

    with worker(shop.app, "celery", "eda.repair.shop"):
        pass

    (warning,) = warnings(records)
    assert "eda.replies.shop" in warning
    assert "eda.on.shop.shop.listen" in warning
    assert "eda.repair.shop" not in warning


def test_a_worker_warns_of_messages_in_a_database_that_was_the_broker(
    make_shop: Callable[..., Shop], records: list[logging.LogRecord], tmp_path: Path
) -> None:
    before = make_shop(broker_url=f"eda+sqlite:///{tmp_path / 'shop.db'}")
    with worker(before.app):
        pass
    with before.eda.transaction():
        before.handle.apply_async(("later",), countdown=3600)
        before.handle.apply_async(("elsewhere",), queue="other")

    with worker(make_shop(broker_url="memory://").app):
        pass

    (warning,) = warnings(records)
    assert warning.startswith("2 messages wait in this database")
    assert "(celery, other)" in warning


def test_every_subscription_gets_an_event_over_the_memory(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    for number in range(3):

        @shop.eda.on("order.*", name=f"shop.on{number}")
        def listen(session: Session, event: Event, number: int = number) -> None:
            shop.handled.append(f"{event.type} {number}")

    with worker(shop.app):
        with shop.eda.transaction():
            shop.eda.emit("order.placed", {})
            shop.eda.emit("order.paid", {})
        shop.relay()
        shop.until(lambda: len(shop.handled) >= 6)

    expected = [f"order.{name} {number}" for name in ("paid", "placed") for number in range(3)]
    assert sorted(shop.handled) == sorted(expected)
