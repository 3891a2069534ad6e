"""What emitting and subscribing do and refuse, without a broker: its address leads nowhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from celery import Celery
from sqlalchemy import Column, MetaData, String, Table, func, select

from celery_eda import EDA, Event
from celery_eda.core.event import EVENT_EXCHANGE, EVENT_TASK
from celery_eda.core.identity import ORDER_HEADER
from celery_eda.core.message import Message
from celery_eda.databases import message_rows, upgrade
from celery_eda.errors import (
    ConfigurationError,
    InvalidEvent,
    InvalidKey,
    OutsideTransaction,
    VersionConflict,
)
from celery_eda.inbox import refusals
from celery_eda.inbox.task import ReliableTask


@dataclass
class Placed:
    """Data of an event."""

    total: int


class Shop:
    """A service whose broker is away."""

    def __init__(self, folder: Path, name: str | None = "shop", **settings: Any) -> None:
        self.app = Celery(name, broker="redis://127.0.0.1:1", set_as_current=False)
        self.app.conf.update(
            eda_database_url=f"sqlite:///{folder / 'shop.db'}",
            eda_send_after_commit=False,
            broker_connection_timeout=0.2,
            **settings,
        )
        self.eda = EDA(self.app)
        upgrade.upgrade(self.eda.databases.engine, self.eda.databases.tables)

    def sent(self) -> list[Message]:
        table = self.eda.databases.tables.outbox
        with self.eda.databases.engine.connect() as connection:
            rows = connection.execute(select(table).order_by(table.c.id)).all()
        return [message_rows.from_row(row) for row in rows]

    def stored(self) -> list[Event]:
        store = self.eda.events.store
        store.assign_positions(self.eda.databases.engine)
        with self.eda.databases.engine.connect() as connection:
            return store.read(connection)

    def counted(self) -> int:
        table = self.eda.databases.tables.sequences
        with self.eda.databases.engine.connect() as connection:
            return connection.execute(select(func.count()).select_from(table)).scalar_one()


@pytest.fixture
def make_shop(tmp_path: Path) -> Iterator[Callable[..., Shop]]:
    shops: list[Shop] = []

    def make(**settings: Any) -> Shop:
        shops.append(Shop(tmp_path, **settings))
        return shops[-1]

    yield make
    for shop in shops:
        shop.eda.databases.engine.dispose()


@pytest.fixture
def shop(make_shop: Callable[..., Shop]) -> Shop:
    return make_shop()


# ── emitting ────────────────────────────────────────────────────────────────────────────────


def test_an_event_is_stored_and_sent_with_the_commit(shop: Shop) -> None:
    with shop.eda.transaction():
        event = shop.eda.emit("order.placed", {"total": 5}, key=7)
        assert shop.sent() == []
        assert shop.stored() == []

    (message,), (stored,) = shop.sent(), shop.stored()
    assert (message.task, message.exchange, message.routing_key) == (
        *(EVENT_TASK, EVENT_EXCHANGE, "order.placed"),
    )
    assert message.identity.id == event.id == stored.id == UUID(message.headers["id"])
    assert message.headers[ORDER_HEADER][:3] == ["shop", "order.#", "7"]
    assert json.loads(message.body)[0] == [event.to_cloud()]
    assert (stored.stream, stored.version, stored.data) == ("order.7", 1, {"total": 5})
    assert list(stored.order or ()) == message.headers[ORDER_HEADER]


def test_what_is_rolled_back_was_never_emitted(shop: Shop) -> None:
    with shop.eda.transaction() as session:
        shop.eda.emit("order.placed", key=7)
        session.rollback()

    with shop.eda.transaction() as session:
        shop.eda.emit("order.paid", key=7)
        with session.begin_nested() as savepoint:
            shop.eda.emit("order.lost", key=7)
            savepoint.rollback()

    assert [each.routing_key for each in shop.sent()] == ["order.paid"]
    assert [(each.type, each.version) for each in shop.stored()] == [("order.paid", 1)]


def test_an_event_without_a_key_is_in_no_stream_and_counts_nothing(shop: Shop) -> None:
    shop.eda.emit("weather.changed")

    (message,), (stored,) = shop.sent(), shop.stored()
    assert ORDER_HEADER not in message.headers
    assert (stored.stream, stored.version, stored.order) == (None, None, None)
    assert shop.counted() == 0


@pytest.mark.parametrize("outside", [None, "store", "send"])
def test_outside_any_transaction_an_event_has_one_of_its_own(
    make_shop: Callable[..., Shop], outside: str | None
) -> None:
    shop = make_shop(eda_outside=outside)

    shop.eda.emit("order.placed", key=7)

    assert [len(shop.sent()), len(shop.stored())] == [1, 1]


def test_outside_any_transaction_an_event_may_be_forbidden(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop(eda_outside="raise")

    with pytest.raises(OutsideTransaction, match=r"The event order\.placed"):
        shop.eda.emit("order.placed", key=7)

    assert not shop.sent()


def test_a_stream_that_is_not_at_the_expected_version_takes_nothing(shop: Shop) -> None:
    shop.eda.emit("order.placed", key=7, expected_version=0)

    def pay() -> None:
        with shop.eda.transaction():
            shop.eda.emit("weather.changed")
            shop.eda.emit("order.paid", key=7, expected_version=0)

    with pytest.raises(VersionConflict):
        pay()

    assert [each.type for each in shop.stored()] == ["order.placed"]
    assert [each.routing_key for each in shop.sent()] == ["order.placed"]


def test_the_data_may_be_of_a_registered_class(shop: Shop) -> None:
    shop.eda.event("order.placed", version=2)(Placed)

    shop.eda.emit("order.placed", Placed(5))

    (stored,) = shop.stored()
    assert (stored.data, stored.data_version) == ({"total": 5}, 2)


def test_what_is_changed_in_the_data_after_it_was_emitted_is_not_in_the_event(shop: Shop) -> None:
    data = {"lines": [1]}

    with shop.eda.transaction():
        shop.eda.emit("order.placed", data)
        data["lines"].append(2)

    (message,), (stored,) = shop.sent(), shop.stored()
    assert stored.data == json.loads(message.body)[0][0]["data"] == {"lines": [1]}


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (("order placed",), {}, InvalidEvent, "no name of an event"),
        (("order.placed", object()), {}, InvalidEvent, "cannot be written as JSON"),
        (("order.placed",), {"expected_version": 1}, InvalidEvent, "without a key"),
        (("order.placed",), {"key": ["7"]}, InvalidKey, "no ordering key"),
    ],
)
def test_what_is_no_event_is_refused_at_once(
    shop: Shop, arguments: Any, options: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words), shop.eda.transaction():
        shop.eda.emit(*arguments, **options)

    assert not shop.sent()


def test_a_service_without_a_name_cannot_emit(make_shop: Callable[..., Shop]) -> None:
    with pytest.raises(ConfigurationError, match="eda_service"):
        make_shop(name=None).eda.emit("order.placed")


def test_events_know_what_they_followed_from(shop: Shop) -> None:
    @shop.eda.on("order.*", name="shop.follow")
    def follow(event: Event) -> None:
        shop.eda.emit("follow.up", event.type)

    first = shop.eda.emit("order.placed", correlation_id="the beginning")
    follow.apply((first.to_cloud(),))
    second = shop.stored()[1]
    follow.apply((shop.eda.emit("order.paid").to_cloud(),))
    third, fourth = shop.stored()[2:]

    assert (first.correlation_id, first.causation_id) == ("the beginning", None)
    assert (second.correlation_id, second.causation_id) == ("the beginning", str(first.id))
    assert (third.correlation_id, third.causation_id) == (str(third.id), None)
    assert (fourth.correlation_id, fourth.causation_id) == (str(third.id), str(third.id))


# ── subscribing ─────────────────────────────────────────────────────────────────────────────


def test_a_handler_gets_the_event_with_its_data_in_the_latest_shape(shop: Shop) -> None:
    shop.eda.event("order.placed", version=2)(Placed)
    shop.eda.upcaster("order.placed", 1)(lambda data: {"total": data["sum"]})
    got: list[Any] = []

    @shop.eda.on("order.#", name="shop.take")
    def take(event: Event) -> None:
        got.append(event.data)

    cloud = shop.eda.emit("order.placed", Placed(5)).to_cloud()
    take.apply(({**cloud, "dataversion": 1, "data": {"sum": 4}},))

    assert got == [Placed(4)]


def test_the_queue_of_an_ordered_subscription_gets_the_whole_category(shop: Shop) -> None:
    @shop.eda.on("order.paid", "order.*.late", "stock.#", name="shop.ordered", ordered=True)
    def ordered(event: Event) -> None: ...

    @shop.eda.on("order.paid", "stock.#", name="shop.unordered")
    def unordered(event: Event) -> None: ...

    queues = {
        queue: [each.routing_key for each in shop.eda.events.queues.queue_of(each).bindings]
        for queue, each in shop.eda.events.subscriptions.by_queue.items()
    }
    assert {queue: sorted(keys) for queue, keys in queues.items()} == {
        "eda.on.shop.shop.ordered": ["order.#", "stock.#"],
        "eda.on.shop.shop.unordered": ["order.paid", "stock.#"],
    }


@pytest.mark.parametrize(
    ("patterns", "options", "error", "words"),
    [
        ((), {}, ConfigurationError, "subscribes to no event"),
        (("order placed",), {}, InvalidEvent, "no pattern"),
        (("*.placed",), {"ordered": True}, ConfigurationError, "Begin the pattern with a category"),
        (("#",), {"ordered": True}, ConfigurationError, "Begin the pattern with a category"),
        (("order.*",), {"ordered": True, "every_worker": True}, ConfigurationError, "misses"),
        (("order.*",), {"bind": True}, ConfigurationError, "bind"),
        (("order.*",), {"key": "event"}, ConfigurationError, "key"),
        (("order.*",), {"acks_late": False}, ConfigurationError, "acks_late"),
    ],
)
def test_what_cannot_be_subscribed_is_refused_at_once(
    shop: Shop, patterns: Any, options: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        shop.eda.on(*patterns, **options)(lambda event: None)


def test_a_handler_in_every_worker_has_no_session(shop: Shop) -> None:
    with pytest.raises(ConfigurationError, match="no session"):
        shop.eda.on("order.*", every_worker=True)(lambda session, event: None)


def test_a_handler_in_every_worker_is_a_plain_task_whatever_the_settings_say(
    make_shop: Callable[..., Shop],
) -> None:
    shop = make_shop(eda_tasks=["shop.*"])
    one = shop.eda.on("order.*", name="shop.cache", every_worker=True)(lambda event: None)

    @shop.app.task(name="shop.other", shared=False)
    def other() -> None: ...

    shop.app.finalize()

    reliable = [shop.eda.service.is_reliable(each.name) for each in (one, other)]

    assert reliable == [False, True]
    assert not isinstance(one, ReliableTask)
    assert shop.eda.events.subscriptions.by_queue == {}


def test_what_is_subscribed_needs_no_settings_before_the_app_is_configured() -> None:
    app = Celery("shop", set_as_current=False)
    eda = EDA(app)
    copies = Table("copies", MetaData(), Column("id", String(9), primary_key=True))

    eda.on("order.*", name="shop.take")(lambda event: None)
    eda.on("order.*", name="shop.cache", every_worker=True)(lambda event: None)
    eda.projection("order.*", name="shop.copy", table=copies)(lambda row, event: row)
    eda.event("order.placed")(Placed)

    app.conf.update(eda_database_url="sqlite://", eda_service="late")
    assert sorted(eda.events.subscriptions.by_queue) == [
        *("eda.on.late.shop.copy", "eda.on.late.shop.take"),
    ]


def test_a_name_too_long_for_a_queue_is_refused_with_the_remedy(shop: Shop) -> None:
    shop.eda.on("order.*", name="x" * 250)(lambda event: None)

    with pytest.raises(ConfigurationError, match=r"name=…"):
        shop.eda.events.subscriptions.by_queue  # noqa: B018  # reading it makes the names


def arrived(headers: Any, **info: Any) -> Any:
    """A message of kombu's, as it came."""
    return SimpleNamespace(
        headers=headers,
        properties={},
        body=b"[[], {}, {}]",
        content_type="application/json",
        content_encoding="utf-8",
        delivery_info={"exchange": EVENT_EXCHANGE, "routing_key": "order.placed", **info},
    )


def test_an_event_becomes_a_call_of_the_subscription_it_came_to(shop: Shop) -> None:
    for name, ordered in (("shop.one", False), ("shop.two", True)):
        shop.eda.on("order.*", name=name, ordered=ordered)(lambda event: None)
    id_ = str(uuid4())
    headers = {"task": EVENT_TASK, "id": id_, ORDER_HEADER: ["shop", "order.#", "7", 1, 1]}

    ids = set()
    for name, subscription in shop.eda.events.subscriptions.known.items():
        message = arrived(dict(headers), redelivered=True)
        shop.eda.events.subscriptions.address(message, subscription, f"eda.on.shop.{name}")
        assert message.headers["task"] == name
        assert (ORDER_HEADER in message.headers) == (name == "shop.two")
        route = {"exchange": "", "routing_key": f"eda.on.shop.{name}", "redelivered": True}
        assert message.delivery_info == route
        ids.add(message.headers["id"])
    assert len(ids - {id_}) == 2


@pytest.mark.parametrize("headers", [None, "no headers", {}, {"task": EVENT_TASK, "id": [7]}])
def test_what_is_no_event_is_left_to_the_inspection(shop: Shop, headers: Any) -> None:
    shop.eda.on("order.*", name="shop.one")(lambda event: None)
    message = arrived(headers)

    known, queue = shop.eda.events.subscriptions.known, "eda.on.shop.shop.one"
    shop.eda.events.subscriptions.address(message, known["shop.one"], queue)

    assert message.delivery_info["routing_key"] == "eda.on.shop.shop.one"


def test_what_a_subscription_s_queue_gives_up_is_redriven_to_that_queue(shop: Shop) -> None:
    death = {
        "reason": "delivery_limit",
        "queue": "eda.on.shop.shop.one",
        "exchange": EVENT_EXCHANGE,
        "routing-keys": ["order.placed"],
    }

    letter = refusals.given_up(arrived({"task": EVENT_TASK, "x-death": [death]})).letter

    assert (letter.exchange, letter.routing_key) == ("", "eda.on.shop.shop.one")
