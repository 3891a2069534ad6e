"""Inside a transaction calls of tasks are captured. Everything else goes to the broker as ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, group, signals
from kombu import Connection, Exchange, Queue
from sqlalchemy import select, text
from sqlalchemy.orm import Session, sessionmaker

from celery_eda import EDA
from celery_eda.errors import OtherBroker
from tests.support.databases import Database

RAW = Queue("raw", Exchange("raw"), routing_key="raw")


class Shop:
    """An app with an outbox, and a broker in memory."""

    def __init__(self, database: Database, **settings: Any) -> None:
        self.database = database
        self.app = Celery(
            "shop",
            broker=f"memory://{uuid4()}",
            broker_transport_options={"polling_interval": 0},
            set_as_current=False,
        )
        self.app.conf.update(eda_send_after_commit=False, **settings)
        self.eda = EDA(self.app, engine=database.engine)

        @self.app.task(name="shop.add", shared=False)
        def add(x: int, y: int) -> int:
            return x + y

        self.add = add
        self.read("raw")
        self.read("celery")

    def read(self, queue: str) -> list[Any]:
        """Take what is in *queue* of the broker."""
        with self.app.connection_for_read() as broker:
            if queue == "raw":
                RAW.bind(broker.default_channel).declare()
            simple, bodies = broker.SimpleQueue(queue), []
            while True:
                try:
                    message = simple.get(block=False)
                except simple.Empty:
                    return bodies
                message.ack()
                bodies.append(message.payload)

    def stored(self) -> list[str]:
        """The tasks of what waits in the outbox."""
        columns = self.database.tables.outbox.c
        with self.database.engine.connect() as connection:
            return list(connection.scalars(select(columns.task).order_by(columns.id)))


@pytest.fixture
def shop(database: Database) -> Shop:
    return Shop(database)


@pytest.fixture(params=["transaction", "attached session"])
def opened(request: pytest.FixtureRequest, shop: Shop) -> Callable[[], Any]:
    """Opens a transaction in which calls are captured."""
    if request.param == "transaction":
        return shop.eda.transaction
    sessions = sessionmaker(shop.database.engine)
    shop.eda.attach(sessions)

    def open_session() -> AbstractContextManager[Session]:
        session = sessions()
        session.execute(text("SELECT 1"))
        return session

    return open_session


def from_the_pool(app: Celery) -> None:
    with app.producer_pool.acquire(block=True) as producer:
        producer.publish({"hello": 1}, exchange=RAW.exchange, routing_key="raw", declare=[RAW])


def from_the_pool_of_amqp(app: Celery) -> None:
    with app.amqp.producer_pool.acquire(block=True) as producer:
        producer.publish({"hello": 1}, exchange=RAW.exchange, routing_key="raw", retry=True)


def from_the_app(app: Celery) -> None:
    with app.producer_or_acquire() as producer:
        producer.publish({"hello": 1}, exchange=RAW.exchange, routing_key="raw", retry=True)


def with_the_connection_of_a_producer(app: Celery) -> None:
    with app.producer_or_acquire() as producer:
        bound = RAW.exchange(producer.connection.default_channel)
        bound.publish(bound.Message('{"hello": 1}', content_type="application/json"), "raw")


@pytest.mark.parametrize(
    "publish",
    [from_the_pool, from_the_pool_of_amqp, from_the_app, with_the_connection_of_a_producer],
)
def test_a_message_that_is_no_call_is_sent_at_once(
    shop: Shop, opened: Callable[[], Any], publish: Callable[[Celery], None]
) -> None:
    for _ in range(20):  # more often than the pool has producers
        with opened():
            publish(shop.app)

            assert shop.read("raw") == [{"hello": 1}]

    assert shop.stored() == []


@pytest.fixture
def pidbox(shop: Shop) -> Iterator[Callable[[], list[Any]]]:
    """Reads the control commands that a worker would get."""
    with shop.app.connection_for_read() as connection:
        queue = shop.app.control.mailbox.get_queue("w@h")
        queue(connection.default_channel).declare()
        yield lambda: [each["method"] for each in shop.read(queue.name)]


@pytest.mark.parametrize(
    ("command", "method"),
    [
        (lambda app: app.control.revoke("x"), "revoke"),
        (lambda app: app.control.broadcast("shutdown"), "shutdown"),
        (lambda app: app.control.rate_limit("shop.add", "1/s"), "rate_limit"),
        (lambda app: app.control.inspect(timeout=0.01).active(), "active"),
        (lambda app: app.AsyncResult("x").revoke(terminate=True), "revoke"),
    ],
    ids=["revoke", "broadcast", "rate_limit", "inspect", "AsyncResult"],
)
def test_a_command_to_workers_is_sent_at_once(
    shop: Shop,
    opened: Callable[[], Any],
    pidbox: Callable[[], list[Any]],
    command: Callable[[Celery], Any],
    method: str,
) -> None:
    with opened():
        command(shop.app)

        assert pidbox() == [method]


def test_an_event_of_the_monitoring_is_sent_at_once(shop: Shop, opened: Callable[[], Any]) -> None:
    with shop.app.connection_for_read() as connection:
        receiver = shop.app.events.Receiver(connection, handlers={})
        receiver.queue(connection.default_channel).declare()

        with opened(), shop.app.events.default_dispatcher() as dispatcher:
            dispatcher.send("task-progress", uuid="x")

        [event] = shop.read(receiver.queue.name)

    assert event["type"] == "task-progress"


def test_what_a_signal_receiver_publishes_beside_a_call_is_sent_at_once(
    shop: Shop, opened: Callable[[], Any]
) -> None:
    def publish(**_: Any) -> None:
        from_the_app(shop.app)
        with_the_connection_of_a_producer(shop.app)

    signals.before_task_publish.connect(publish)
    try:
        with shop.eda.transaction():
            shop.add.delay(1, 2)
    finally:
        signals.before_task_publish.disconnect(publish)

    assert shop.read("raw") == [{"hello": 1}] * 2
    assert shop.stored() == ["shop.add"]


def test_calls_with_a_producer_of_the_app_are_captured(shop: Shop) -> None:
    with shop.app.producer_pool.acquire(block=True) as outside, shop.eda.transaction():
        shop.add.apply_async((1, 2), producer=outside)
        with shop.app.producer_or_acquire() as inside:
            shop.add.apply_async((1, 2), producer=inside, countdown=60)
        with shop.app.producer_pool.acquire(block=True) as inside:
            shop.add.apply_async((1, 2), producer=inside)
        with shop.app.connection_for_write() as connection:
            shop.add.apply_async((1, 2), connection=connection)
        group([shop.add.s(n, n) for n in range(3)], app=shop.app).apply_async()

    assert shop.stored() == ["shop.add"] * 7
    assert shop.read("celery") == []


def test_a_producer_acquired_in_a_transaction_still_sends_after_it(shop: Shop) -> None:
    with shop.eda.transaction():
        held = shop.app.producer_or_acquire()
        producer = held.__enter__()
    shop.add.apply_async((1, 2), producer=producer)
    held.__exit__(None, None, None)

    assert len(shop.read("celery")) == 1
    assert shop.stored() == []


# ── another broker ──────────────────────────────────────────────────────────────────────────


def elsewhere() -> Connection:
    return Connection(f"memory://{uuid4()}")


def by_connection(shop: Shop, connection: Connection) -> None:
    shop.add.apply_async((1, 2), connection=connection)


def by_producer(shop: Shop, connection: Connection) -> None:
    shop.add.apply_async((1, 2), producer=connection.Producer())


def by_name(shop: Shop, connection: Connection) -> None:
    shop.app.send_task("shop.add", (1, 2), connection=connection)


def by_position(shop: Shop, connection: Connection) -> None:
    shop.app.send_task("shop.add", (1, 2), {}, None, None, None, None, connection)


def by_group(shop: Shop, connection: Connection) -> None:
    group([shop.add.s(1, 2)], app=shop.app).apply_async(producer=connection.Producer())


NODES = ["memory://north", "memory://south"]


def after_a_fail_over(shop: Shop) -> Connection:
    connection = shop.app.connection_for_write()
    connection.maybe_switch_next()
    return connection


@pytest.mark.parametrize(
    "connect",
    [
        after_a_fail_over,
        lambda shop: shop.app.connection_for_write(),
        lambda shop: Connection(list(reversed(NODES))),
        lambda shop: Connection(NODES[1]),
    ],
    ids=["switched", "app", "reversed", "node"],
)
def test_a_connection_to_any_node_leads_to_the_broker_of_the_app(
    database: Database, connect: Callable[[Shop], Connection]
) -> None:
    shop = Shop(database, broker_url=NODES)
    with connect(shop) as connection, shop.eda.transaction():
        by_connection(shop, connection)

    assert len(shop.stored()) == 1


@pytest.mark.parametrize("url", ["memory://west", [*NODES, "memory://west"]])
def test_a_connection_that_may_lead_elsewhere_is_refused(database: Database, url: Any) -> None:
    shop = Shop(database, broker_url=NODES)
    with Connection(url) as connection, shop.eda.transaction(), pytest.raises(OtherBroker):
        by_connection(shop, connection)


WAYS = pytest.mark.parametrize("call", [by_connection, by_producer, by_name, by_position, by_group])


@WAYS
def test_a_call_to_another_broker_is_refused_in_a_transaction(
    shop: Shop, opened: Callable[[], Any], call: Callable[[Shop, Connection], None]
) -> None:
    refused = pytest.raises(OtherBroker, match=r"add is called with a connection .*outbox")
    with opened(), elsewhere() as connection, refused:
        call(shop, connection)

    assert shop.stored() == []


@WAYS
def test_a_call_to_another_broker_is_refused_where_it_would_be_stored(
    database: Database, call: Callable[[Shop, Connection], None]
) -> None:
    shop = Shop(database, eda_outside="store")
    with elsewhere() as connection, pytest.raises(OtherBroker):
        call(shop, connection)

    assert shop.stored() == []


@WAYS
def test_a_call_to_another_broker_goes_there_outside_a_transaction(
    shop: Shop, call: Callable[[Shop, Connection], None]
) -> None:
    with elsewhere() as connection:
        call(shop, connection)

        assert connection.connected  # kombu has one memory for all brokers in memory
    assert shop.stored() == []
    assert len(shop.read("celery")) == 1
