"""Single steps of the road, some in two variants; each verb repeats one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from random import Random
from typing import Any

from celery import signals
from kombu import serialization
from kombu.utils.uuid import uuid
from sqlalchemy import Connection, select, text

from benchmarks.contestants.ours import app, carry, eda, fill
from benchmarks.contestants.serving import PAYLOAD, serve
from celery_eda.brokers.rabbitmq.envelopes import Frames
from celery_eda.core import context
from celery_eda.core.message import Message
from celery_eda.databases.message_rows import to_row
from celery_eda.outbox.capture.call_templates import NOTHING_AFTER
from celery_eda.outbox.relay import Relay

#: Rows of one claim of a relay.
BATCH = 500
#: Words for text that compresses about as well as real text.
WORDS = ("cocoa", "milk", "dark", "large", "small", "mint", "cream", "order", "table", "paid")


def capture(count: int) -> list[Message]:
    """Publish *count* calls that fit one template, in a transaction that writes nothing."""
    collected = context.Collected()
    with context.scope_of(collected):
        for _ in range(count):
            carry.delay(PAYLOAD)
    return collected.messages


def capture_by_celery(count: int) -> None:
    """As :func:`capture`, with each message built by Celery because of a signal receiver."""

    def told(**_: Any) -> None: ...

    signals.before_task_publish.connect(told)
    try:
        capture(count)
    finally:
        signals.before_task_publish.disconnect(told)


def capture_nothing(count: int) -> None:
    """Call without building a message: Celery's checks, a body, an id and a result."""

    def send_task(name: str, args: Any, kwargs: Any, **_: Any) -> Any:
        serialization.dumps((args, kwargs, NOTHING_AFTER), "json")
        return carry.AsyncResult(uuid())

    ours, app.send_task = app.send_task, send_task
    try:
        for _ in range(count):
            carry.delay(PAYLOAD)
    finally:
        app.send_task = ours


@contextmanager
def _undone() -> Iterator[Connection]:
    """A transaction of the user's engine that is rolled back."""
    with eda.databases.engine.connect() as connection:
        yield connection
        connection.rollback()


@cache
def _row() -> dict[str, Any]:
    message = capture(2)[1]
    return {**to_row(message), "envelope": message.envelope}


def write_one(count: int) -> None:
    """INSERT one row of the outbox."""
    with _undone() as connection:
        for _ in range(count):
            eda.databases.dialect.add(connection, eda.databases.tables.outbox, [_row()])


def write_as_arrays(count: int) -> None:
    """As :func:`write_one`, with the statement for many rows: arrays, here of length one."""
    statement = eda.databases.dialect._adding(eda.databases.tables.outbox, tuple(_row()))
    with _undone() as connection:
        for _ in range(count):
            arrays = tuple([value] for value in _row().values())
            connection.exec_driver_sql(statement, arrays).all()


def write_by_driver(count: int) -> None:
    """The INSERT of one row, executed by psycopg directly."""
    statement = eda.databases.dialect._adding_one(eda.databases.tables.outbox, tuple(_row()))
    with _undone() as connection:
        cursor = connection.connection.cursor()
        for _ in range(count):
            cursor.execute(statement, tuple(_row().values()), prepare=True)
            cursor.fetchall()


@cache
def _rows_of_text() -> list[dict[str, Any]]:
    """A batch of rows with a kilobyte of words each."""
    random, collected = Random(1), context.Collected()
    with context.scope_of(collected):
        for _ in range(BATCH):
            words = (f"{random.choice(WORDS)} {random.randrange(1000)}" for _ in range(110))
            carry.delay(" ".join(words)[:1000])
    return [{**to_row(each), "envelope": each.envelope} for each in collected.messages]


def write_compressed(method: str, count: int) -> None:
    """INSERT rows of text in batches, compressed by this *method* of PostgreSQL."""
    table = eda.databases.tables.outbox
    columns = ("headers", "properties", "body", "envelope")
    changes = (f"ALTER COLUMN {name} SET COMPRESSION {method}" for name in columns)
    with _undone() as connection:
        connection.execute(text(f"ALTER TABLE {table.name} {', '.join(changes)}"))
        for _ in range(count // BATCH):
            eda.databases.dialect.add(connection, table, _rows_of_text())


def read(count: int) -> None:
    """Claim *count* rows in batches, and build messages from them."""
    for _ in range(count // BATCH):
        assert len(_claimed()) == BATCH, "the outbox has too few"


def _claimed() -> list[Message]:
    with eda.databases.relay_engine.connect() as connection:
        pending = eda.outbox.store.claim(connection, "0" * 32, BATCH)
        connection.rollback()
    return [each.message for each in pending]


@cache
def _messages() -> list[Message]:
    return _claimed()


def make_frames(count: int) -> None:
    """Encode the AMQP frames of *count* messages."""
    for _ in range(count // BATCH):
        frames = Frames(1, 131_072)
        for message in _messages():
            frames.add(message)
        frames.take()


@cache
def _relay() -> Relay:
    with app.connection_for_write() as connection:
        app.amqp.queues[app.conf.task_default_queue](connection.default_channel).declare()
    return eda.outbox.relay()


def send_one_by_one(ids: list[int]) -> None:
    """Send the messages with these ids, one at a time."""
    for row_id in ids:
        _relay().send([row_id])


def published(count: int) -> list[int]:
    """Publish *count* messages; returns the ids of their rows."""
    fill(count)
    table = eda.databases.tables.outbox
    with eda.databases.engine.connect() as connection:
        newest = select(table.c.id).order_by(table.c.id.desc()).limit(count)
        return sorted(connection.scalars(newest))


VERBS: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        capture_by_celery,
        capture_nothing,
        write_one,
        write_as_arrays,
        write_by_driver,
        write_compressed,
        read,
        make_frames,
        send_one_by_one,
        published,
    )
}
# Its return value cannot be sent as JSON.
VERBS["capture"] = lambda count: len(capture(count))

if __name__ == "__main__":
    serve(VERBS)
