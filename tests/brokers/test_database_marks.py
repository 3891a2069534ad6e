"""Claims begin behind what was taken: nothing dead is passed, and nothing that waits is missed.

A look at the whole of a queue would find everything; so there is none here but the first, unless
it is what a test is about.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from kombu import Connection, Consumer, Queue
from kombu.message import Message
from sqlalchemy import Engine, create_engine, text

from celery_eda.brokers.database import watermarks
from celery_eda.brokers.database.broker import kombu_message, queued
from celery_eda.brokers.database.postgresql import PostgreSQLQueues
from celery_eda.brokers.database.queues import Lease, Queued, Queues
from celery_eda.brokers.database.watermarks import Watermarks
from celery_eda.databases.postgresql import PostgreSQL
from celery_eda.databases.tables import Tables
from tests.brokers.test_database import drain, get, put, until
from tests.support.brokers import Broker
from tests.support.letters import letter

QUEUES = Queues(Tables.on(), PostgreSQLQueues(PostgreSQL()))
#: Blocks of the database: a claim reads some 30, and one that passes all dead rows some 250.
FEW_BLOCKS = 100
DEAD = 2000


@pytest.fixture
def broker(eda_postgresql_broker: Broker) -> Broker:
    return eda_postgresql_broker


@pytest.fixture
def engine(broker: Broker) -> Iterator[Engine]:
    engine = create_engine(broker.url.removeprefix("eda+"))
    yield engine
    engine.dispose()


@pytest.fixture(params=[{}, {"heartbeat": 30}], ids=["told", "not told"])
def connect(request: pytest.FixtureRequest, broker: Broker) -> Iterator[Callable[[], Connection]]:
    """Makes connections that are told what can be taken, or that look by themselves."""
    made: list[Connection] = []

    def make() -> Connection:
        made.append(Connection(broker.url, transport_options=request.param))
        return made[-1]

    yield make
    for connection in made:
        connection.release()


@pytest.fixture
def no_whole_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watermarks, "SCAN_INTERVAL", 3600.0)


def a_queued(body: object) -> Queued:
    return queued("letters", kombu_message(letter(body=json.dumps(body).encode())))


def consumed(connection: Connection, count: int) -> list[Any]:
    """The bodies of the next *count* messages, taken by a consumer."""
    found: list[Any] = []

    def take(body: Any, message: Message) -> None:
        found.append(body)
        message.ack()

    with Consumer(connection, [Queue("letters", no_declare=True)], callbacks=[take]) as consumer:
        consumer.qos(prefetch_count=4)
        until(lambda: _drained(connection) or len(found) >= count)
    return found


def got(connection: Connection, count: int) -> list[Any]:
    """The same, asked for one by one."""
    found: list[Any] = []
    until(lambda: found.extend(drain(connection)) or len(found) >= count)
    return found


def _drained(connection: Connection) -> None:
    with suppress(socket.timeout):
        connection.drain_events(timeout=0.5)


def test_a_claim_passes_nothing_that_is_dead(
    no_whole_look: None, broker: Broker, engine: Engine
) -> None:
    with Connection(broker.url) as making:
        making.connect()  # which makes the tables
    marks, old = Watermarks(), engine.connect().execution_options(isolation_level="REPEATABLE READ")
    old.scalar(text("SELECT count(*) FROM pg_class"))
    connection = engine.connect()
    QUEUES.put(connection, [a_queued(number) for number in range(DEAD)])
    connection.commit()

    def blocks_read(passed: Any) -> int:
        queueing = PostgreSQLQueues(PostgreSQL())
        statement, values = queueing.dialect._compiled(
            queueing._leasing(QUEUES.table), connection.dialect
        )
        its = {"its_queue": "letters", "room": 4, "passed": list(passed), "taker": 1}
        (found,) = connection.exec_driver_sql(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", {**values, **its}
        ).scalar_one()
        connection.rollback()
        return int(found["Plan"]["Shared Hit Blocks"] + found["Plan"]["Shared Read Blocks"])

    def claim(passed: Any) -> Any:
        return QUEUES.lease(connection, "letters", 1, 100, passed)

    while rows := marks.claimed("letters", claim):
        QUEUES.complete(connection, [Lease(row.id, row.fence) for row in rows])
        connection.commit()
    QUEUES.put(connection, [a_queued("next")])
    connection.commit()
    passed: list[int] = []
    marks.claimed("letters", lambda now: passed.extend(now) or [])

    assert blocks_read(passed) < FEW_BLOCKS < blocks_read([0] * len(passed))
    old.close()
    connection.close()


@pytest.mark.parametrize("taken", [got, consumed])
def test_what_commits_late_is_found_behind_what_was_taken(
    no_whole_look: None,
    connect: Callable[[], Connection],
    engine: Engine,
    taken: Callable[[Connection, int], list[Any]],
) -> None:
    connection = connect()
    put(connection, "before")
    assert taken(connection, 1) == ["before"]
    with engine.begin() as late:
        QUEUES.put(late, [a_queued("late"), a_queued("too")])
        put(connection, "after")
        assert taken(connection, 1) == ["after"]
    put(connection, "last")

    assert sorted(taken(connection, 3)) == ["last", "late", "too"]


@pytest.mark.parametrize("connect", [{}], indirect=True, ids=["told"])
def test_who_is_told_of_what_commits_late_takes_it_before_what_is_younger(
    no_whole_look: None, connect: Callable[[], Connection], engine: Engine
) -> None:
    connection = connect()
    put(connection, "before")
    assert consumed(connection, 1) == ["before"]
    with engine.begin() as late:
        QUEUES.put(late, [a_queued("late")])
        put(connection, "after")
        assert consumed(connection, 1) == ["after"]
    put(connection, "last")

    assert consumed(connection, 2) == ["late", "last"]


def test_what_another_one_gives_back_is_found(
    no_whole_look: None, connect: Callable[[], Connection]
) -> None:
    one, other = connect(), connect()
    put(one, "first", "second", "third")
    first, second = get(other), get(other)
    assert drain(one) == ["third"]

    first.reject(requeue=True)
    assert got(one, 1) == ["first"]
    second.channel.close()
    assert got(one, 1) == ["second"]


def test_what_a_taker_held_that_is_gone_is_found(
    no_whole_look: None, connect: Callable[[], Connection]
) -> None:
    one, other = connect(), connect()
    put(one, "held", "free")
    get(other)
    assert drain(one) == ["free"]

    other.release()

    assert got(one, 1) == ["held"]


def test_what_comes_due_is_found_behind_what_was_taken(
    no_whole_look: None, connect: Callable[[], Connection]
) -> None:
    connection = connect()
    soon = datetime.now(timezone.utc) + timedelta(seconds=4)
    put(connection, "due", headers={"eta": soon.isoformat()})
    put(connection, "now")
    assert drain(connection) == ["now"]

    assert consumed(connection, 1) == ["due"]


def test_a_higher_priority_is_found_behind_what_was_taken_of_it(
    no_whole_look: None, connect: Callable[[], Connection]
) -> None:
    connection = connect()
    put(connection, "urgent", priority=9)
    put(connection, 1, 2, 3)
    assert [get(connection).payload for _ in range(2)] == ["urgent", 1]
    put(connection, "as urgent", priority=9)
    put(connection, 4)
    put(connection, "urgent, too", priority=5)

    assert drain(connection) == ["as urgent", "urgent, too", 2, 3, 4]


def test_what_a_claim_took_that_was_undone_is_found(
    no_whole_look: None, connect: Callable[[], Connection]
) -> None:
    connection = connect()
    put(connection, "once more")
    taker = connection.transport.ensure_taker()

    def fail() -> None:
        with taker.transaction() as database:
            raise LookupError(*[row.id for row in taker.lease(database, "letters", 1)])

    with pytest.raises(LookupError, match="1"):
        fail()
    assert drain(connection) == ["once more"]


def test_what_nobody_tells_is_found_by_a_look_at_the_whole(
    connect: Callable[[], Connection], engine: Engine
) -> None:
    connection = connect()
    put(connection, "locked", "free")
    locking = engine.connect()
    locking.execute(text("SELECT id FROM eda_queue ORDER BY id LIMIT 1 FOR UPDATE"))
    assert drain(connection) == ["free"]

    locking.close()  # undone, and nobody is told

    assert got(connection, 1) == ["locked"]


def test_a_look_at_the_whole_that_takes_long_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(watermarks, "monotonic", lambda: now)
    marks, begun = Watermarks(), []

    def claim(passed: Any) -> list[Any]:
        nonlocal now
        begun.append(passed[0])
        now += 10.0
        return [_Row(rank=0, id=now)]

    for now in (100.0, 111.0, 200.0, 309.0, 311.0):  # noqa: B007  # is the clock
        marks.claimed("letters", claim)

    assert begun == [0, 110, 110 + 11, 210, 0]


class _Row:
    def __init__(self, rank: int, id: float) -> None:
        self.rank, self.id = rank, int(id)
