"""A database as the broker: order, time, fan-out, and whose a message is."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import Connection, Consumer, Exchange, Producer, Queue
from kombu.asynchronous import Hub
from sqlalchemy import create_engine, func, select, text

from celery_eda.brokers.database.broker import broker_at
from celery_eda.brokers.database.postgresql_presence import require_direct
from celery_eda.brokers.database.queueing import Queueing
from celery_eda.brokers.database.queues import Lease
from celery_eda.brokers.database.sqlite import SQLiteQueues
from celery_eda.brokers.database.sqlite_presence import refuse_remote
from celery_eda.brokers.database.taker import Taker
from celery_eda.databases.tables import Tables
from celery_eda.errors import ConfigurationError
from tests.support.brokers import Broker
from tests.support.waiting import BOUND

HOLD = """
import sys, time
import celery_eda
from kombu import Connection, Queue

connection = Connection(sys.argv[1])
for _ in range(2):
    Queue("letters")(connection.default_channel).get()
print("held", flush=True)
time.sleep(600)
"""
HOLD_AND_FORK = HOLD.replace('print("held"', 'import os; os.fork() and print("held"')


@pytest.fixture(params=["eda_sqlite", "eda_postgresql"])
def broker(request: pytest.FixtureRequest) -> Broker:
    """Every database that can be a broker."""
    found: Broker = request.getfixturevalue(f"{request.param}_broker")
    return found


@pytest.fixture
def connect(broker: Broker) -> Iterator[Callable[..., Connection]]:
    """Makes connections, and closes them when the test is over."""
    made: list[Connection] = []

    def make(**options: Any) -> Connection:
        made.append(Connection(broker.url, transport_options=options))
        return made[-1]

    yield make
    for connection in made:
        connection.release()


def put(connection: Connection, *bodies: object, queue: str = "letters", **options: Any) -> None:
    producer = Producer(connection.default_channel)
    for body in bodies:
        producer.publish(body, routing_key=queue, serializer="json", **options)


def get(connection: Connection, queue: str = "letters") -> Any:
    """The next message, leased; None if there is none."""
    return Queue(queue, no_declare=True)(connection.default_channel).get()


def drain(connection: Connection, queue: str = "letters") -> list[Any]:
    """The bodies of all that can be taken."""
    found = []
    while (message := get(connection, queue)) is not None:
        found.append(message.payload)
        message.ack()
    return found


def until(condition: Callable[[], Any], seconds: float = BOUND) -> float:
    """Wait until *condition* holds; returns how long that took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() < begun + seconds
        time.sleep(0.01)
    return time.monotonic() - begun


def rows(broker: Broker) -> int:
    engine = create_engine(broker.url.removeprefix("eda+"))
    with engine.connect() as connection:
        return int(connection.scalar(select(func.count()).select_from(Tables.on().queue)) or 0)


# ── order and time ──────────────────────────────────────────────────────────────────────────


def test_messages_come_in_the_order_in_which_they_were_sent(connect: Callable[..., Any]) -> None:
    connection = connect()
    put(connection, *range(20))

    assert drain(connection) == list(range(20))


def test_the_highest_priority_comes_first_and_among_equals_the_oldest(
    connect: Callable[..., Any],
) -> None:
    connection = connect()
    for body, priority in (("a", 0), ("b", 9), ("c", 5), ("d", 9), ("e", None), ("f", 99)):
        put(connection, body, priority=priority)

    assert drain(connection) == ["b", "d", "f", "c", "a", "e"]


def test_a_message_whose_lifetime_is_over_is_not_delivered_and_does_not_stay(
    broker: Broker, connect: Callable[..., Any]
) -> None:
    connection = connect()
    put(connection, "short", expiration=0.2)
    put(connection, "long", expiration=600)
    time.sleep(0.3)

    assert drain(connection) == ["long"]
    until(lambda: get(connection) is None and rows(broker) == 0)


def test_a_message_with_a_time_waits_in_the_database_until_then(
    connect: Callable[..., Any],
) -> None:
    connection = connect()
    due = datetime.now(timezone.utc) + timedelta(seconds=1.5)
    put(connection, "later", headers={"eta": due.isoformat()})
    put(connection, "now")
    arrived: dict[Any, datetime] = {}

    def note(body: Any, _: Any) -> None:
        arrived[body] = datetime.now(timezone.utc)

    with Consumer(connection, [Queue("letters")], callbacks=[note]):
        until(lambda: not connection.drain_events(timeout=BOUND) and len(arrived) == 2)

    assert arrived["later"] >= due


def test_an_event_loop_that_comes_after_the_consumer_delivers_at_once(
    connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (Queueing, SQLiteQueues):
        monkeypatch.setattr(kind, "poll_interval", 10 * BOUND)
    connection, loop, arrived = connect(), Hub(), list[Any]()
    put(connection, "letter")

    with Consumer(connection, [Queue("letters")], callbacks=[lambda body, _: arrived.append(body)]):
        connection.register_with_event_loop(loop)
        until(lambda: loop.run_once() or arrived)

    assert arrived == ["letter"]


@pytest.mark.parametrize("eta", ["not-a-date", "9999-12-31T23:59:59+00:00", "2001-01-01", 7, []])
def test_a_time_that_is_none_is_left_to_the_worker(connect: Callable[..., Any], eta: Any) -> None:
    connection = connect()

    put(connection, "odd", headers={"eta": eta})

    assert drain(connection) == ["odd"]


# ── exchanges ───────────────────────────────────────────────────────────────────────────────


def test_a_fan_out_reaches_every_queue_bound_by_anybody(connect: Callable[..., Any]) -> None:
    sender, north, south = connect(), connect(), connect()
    news = Exchange("news", type="fanout")
    for connection, name in ((north, "north"), (south, "south")):
        Queue(name, news)(connection.default_channel).declare()

    Producer(sender.default_channel, news).publish("extra", serializer="json")

    assert drain(north, "north") == drain(south, "south") == ["extra"]


def test_a_topic_reaches_the_queues_whose_pattern_it_fits(connect: Callable[..., Any]) -> None:
    sender, receiver = connect(), connect()
    events = Exchange("events", type="topic")
    for name, pattern in (("orders", "order.#"), ("placed", "*.placed"), ("other", "mail.*")):
        Queue(name, events, routing_key=pattern)(receiver.default_channel).declare()

    Producer(sender.default_channel, events).publish(1, routing_key="order.placed")

    assert [drain(receiver, name) for name in ("orders", "placed", "other")] == [[1], [1], []]


def test_a_private_queue_and_what_is_in_it_go_with_the_connection_that_made_it(
    broker: Broker, connect: Callable[..., Any]
) -> None:
    sender, listener = connect(), connect()
    events = Exchange("events", type="topic")
    private = Queue("mine", events, routing_key="#", auto_delete=True, durable=False)
    private(listener.default_channel).declare()
    producer = Producer(sender.default_channel, events)
    producer.publish("heard", routing_key="a")
    assert rows(broker) == 1

    listener.release()
    producer.publish("unheard", routing_key="a")

    assert rows(broker) == 0


def test_a_private_queue_belongs_to_who_takes_from_it_whoever_declares_it(
    broker: Broker, connect: Callable[..., Any]
) -> None:
    early, listener, late = connect(), connect(), connect()
    private = Queue("mine", auto_delete=True, durable=False)
    private(early.default_channel).declare()
    heard: list[Any] = []
    with Consumer(listener, [private], callbacks=[lambda body, _: heard.append(body)], no_ack=True):
        private(late.default_channel).declare()
        early.release()
        late.release()

        put(connect(), "still there", queue="mine")
        listener.drain_events(timeout=10)

    assert heard == ["still there"]
    listener.release()
    with pytest.raises(Exception, match="NOT_FOUND"):
        private(connect().default_channel).queue_declare(passive=True)


def test_a_queue_can_be_counted_emptied_and_deleted(connect: Callable[..., Any]) -> None:
    connection = connect()
    queue = Queue("letters")(connection.default_channel)
    queue.declare()
    put(connection, *range(3))

    assert queue.queue_declare(passive=True).message_count == 3
    assert queue.purge() == 3
    queue.delete()
    with pytest.raises(connection.channel_errors, match="NOT_FOUND"):
        queue.queue_declare(passive=True)


# ── whose a message is ──────────────────────────────────────────────────────────────────────


def test_what_one_holds_nobody_else_gets(connect: Callable[..., Any]) -> None:
    one, other = connect(), connect()
    put(one, "mine", "yours")

    mine = get(one)

    assert (mine.payload, drain(other)) == ("mine", ["yours"])


def test_what_is_rejected_to_be_queued_again_is_at_its_old_place_and_says_so(
    connect: Callable[..., Any],
) -> None:
    connection = connect()
    put(connection, "first", "second")

    get(connection).reject(requeue=True)
    again = get(connection)

    assert again.payload == "first"
    assert again.delivery_info["redelivered"]


def test_what_is_rejected_for_good_is_gone(broker: Broker, connect: Callable[..., Any]) -> None:
    connection = connect()
    put(connection, "bad")

    get(connection).reject()

    assert rows(broker) == 0


def test_what_a_closed_connection_held_comes_back_at_once(connect: Callable[..., Any]) -> None:
    one, other = connect(), connect()
    put(one, "held")
    get(one)

    one.release()

    assert drain(other) == ["held"]


def test_an_acknowledgement_of_what_somebody_else_has_taken_changes_nothing(
    broker: Broker, connect: Callable[..., Any]
) -> None:
    one, other = connect(), connect()
    put(one, "contended")
    held = get(one)
    taker = one.transport.ensure_taker()
    with taker.transaction() as database:  # as whoever finds that it is gone
        taker.queues.reclaim(database, taker.id)
    taken = get(other)

    held.ack()
    assert rows(broker) == 1
    taken.ack()

    assert rows(broker) == 0
    assert [Lease.of(each.delivery_tag).fence for each in (held, taken)] == [1, 2]


def test_an_acknowledgement_after_the_connection_was_closed_still_counts_if_nobody_has_it(
    broker: Broker, connect: Callable[..., Any]
) -> None:
    one, other = connect(), connect()
    put(one, "done")
    held = get(one)
    one.release()

    held.ack()
    other.transport.ensure_taker().sweep()

    assert rows(broker) == 0


@pytest.mark.parametrize("code", [HOLD, HOLD_AND_FORK], ids=["alone", "with a child that lives"])
def test_what_a_killed_process_held_is_taken_over(
    broker: Broker, connect: Callable[..., Any], code: str
) -> None:
    connection = connect()
    put(connection, "one", "two", "three")
    holder = subprocess.Popen(
        [sys.executable, "-c", code, broker.url], stdout=subprocess.PIPE, start_new_session=True
    )
    assert holder.stdout
    assert holder.stdout.readline() == b"held\n"
    found = drain(connection)

    holder.kill()
    until(lambda: found.extend(drain(connection)) or len(found) == 3)
    os.killpg(holder.pid, signal.SIGKILL)
    holder.communicate()

    assert found == ["three", "one", "two"]


def test_a_process_that_stands_still_keeps_what_it_holds(
    broker: Broker, connect: Callable[..., Any]
) -> None:
    connection = connect()
    put(connection, "one", "two")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, broker.url], stdout=subprocess.PIPE, start_new_session=True
    )
    assert holder.stdout
    assert holder.stdout.readline() == b"held\n"

    holder.send_signal(signal.SIGSTOP)
    time.sleep(2.0)  # in which a dead one would have been missed
    found = drain(connection)
    holder.kill()
    holder.communicate()

    assert found == []


def test_a_write_lock_that_somebody_holds_for_long_makes_a_taker_try_again_and_not_wait(
    eda_sqlite_broker: Broker,
) -> None:
    file = eda_sqlite_broker.url.removeprefix("eda+sqlite:///")
    arrived: list[Any] = []
    with Connection(eda_sqlite_broker.url) as connection, sqlite3.connect(file) as handler:
        put(connection, "late")
        callbacks = [lambda body, message: (arrived.append(body), message.ack())]
        with Consumer(connection, [Queue("letters")], callbacks=callbacks):
            handler.execute("BEGIN IMMEDIATE")
            begun = time.monotonic()
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=0.5)
            waited = time.monotonic() - begun
            handler.rollback()
            connection.drain_events(timeout=BOUND)

    assert arrived == ["late"]
    assert waited < 25.0  # and not the 30 s that a handler would wait
    assert rows(eda_sqlite_broker) == 0


# ── what cannot be a broker ─────────────────────────────────────────────────────────────────


def test_a_sqlite_database_in_memory_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="in memory"):
        Connection("eda+sqlite://").connect()


def test_mariadb_is_refused(mariadb_url: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be the broker"):
        Connection(f"eda+{mariadb_url}").connect()


def test_a_pooler_between_is_told_by_a_process_that_the_server_does_not_know(
    postgresql_url: str,
) -> None:
    with create_engine(postgresql_url).connect() as connection:
        driver: Any = connection.connection.driver_connection

        require_direct(connection, driver.pgconn.backend_pid)
        with pytest.raises(ConfigurationError, match="pgbouncer"):
            require_direct(connection, driver.pgconn.backend_pid + 1)


def test_a_pooler_needs_a_heartbeat(pgbouncer_url: str) -> None:
    with Connection(f"eda+{pgbouncer_url}") as connection:
        put(connection, "a letter")
        with pytest.raises(ConfigurationError, match="'heartbeat': 30"):
            get(connection)
    options = {"heartbeat": 30}
    with Connection(f"eda+{pgbouncer_url}", transport_options=options) as connection:
        assert drain(connection) == ["a letter"]


@pytest.mark.parametrize("options", [{"heartbeat": 0}, {"heartbeat": "soon"}])
def test_a_heartbeat_that_makes_no_sense_is_refused(
    postgresql_url: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match="counts as dead"):
        Connection(f"eda+{postgresql_url}", transport_options=options).connect()


def test_a_heartbeat_is_for_postgresql(tmp_path: Path) -> None:
    options = {"heartbeat": 30}
    with pytest.raises(ConfigurationError, match="counts as dead"):
        Connection(f"eda+sqlite:///{tmp_path}/q.db", transport_options=options).connect()


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_network_file_system_is_refused(kind: str) -> None:
    mounts = f"/dev/sda1 / ext4 rw 0 0\nserver:/export /srv/data {kind} rw 0 0\n"

    with pytest.raises(ConfigurationError, match=kind):
        refuse_remote(Path("/srv/data/shop/queue.db"), mounts)
    refuse_remote(Path("/srv/other/queue.db"), mounts)


def test_an_unknown_degree_of_durability_is_refused(tmp_path: Path) -> None:
    connection = Connection(
        f"eda+sqlite:///{tmp_path}/q.db", transport_options={"synchronous": "OFF"}
    )

    with pytest.raises(ConfigurationError, match="survives a loss of power"):
        connection.connect()


@pytest.mark.parametrize(("chosen", "level"), [({}, 2), ({"synchronous": "NORMAL"}, 1)])
def test_a_commit_waits_for_the_disk_unless_told_otherwise(
    tmp_path: Path, chosen: dict[str, str], level: int
) -> None:
    broker = broker_at(f"sqlite:///{tmp_path}/q.db", chosen)
    broker.make_ready()

    with broker.engine.connect() as connection:
        assert connection.scalar(text("PRAGMA synchronous")) == level
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"


def test_a_row_that_somebody_has_spoilt_comes_as_unreadable(
    broker: Broker, connect: Callable[..., Any]
) -> None:
    connection = connect()
    put(connection, "sound")
    engine = create_engine(broker.url.removeprefix("eda+"))
    with engine.begin() as database:
        database.execute(Tables.on().queue.update().values(message="{"))

    spoilt = get(connection)

    assert "eda_unreadable" in spoilt.headers
    assert spoilt.body == b'"sound"'


def test_an_app_without_extension_has_it_by_importing_the_package(broker: Broker) -> None:
    app = Celery("plain", broker=broker.url, set_as_current=False)

    app.send_task("some.task", queue="letters")

    with app.connection_for_read() as connection:
        assert get(connection).headers["task"] == "some.task"


def test_a_taker_that_ends_leaves_no_trace(broker: Broker, connect: Callable[..., Any]) -> None:
    put(connect(), "here")
    shared = broker_at(broker.url.removeprefix("eda+"), {})

    Taker(shared).end()

    with shared.engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(Tables.on().takers)) == 0
