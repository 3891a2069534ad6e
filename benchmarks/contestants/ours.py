"""celery_eda, with its default settings unless the stage says otherwise."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from typing import Any
from uuid import uuid4

from celery import Celery
from sqlalchemy import create_engine, delete, func, insert, select, text, update
from sqlalchemy.orm import Session, sessionmaker

from benchmarks.contestants import marks
from benchmarks.contestants.serving import PAYLOAD, environment, serve
from celery_eda import EDA, Event
from celery_eda.core import checkpoints
from celery_eda.core.identity import Identity
from celery_eda.outbox.relay import CHAIN
from celery_eda.outbox.store import Pending
from tests.faults.programs.tables import effects, orders

app = Celery("ours", broker=environment("BROKER"), set_as_current=False)
app.conf.update(
    eda_database_url=environment("DATABASE"),
    task_default_queue=environment("QUEUE") or "ours",
    task_default_queue_type=environment("QUEUE_TYPE") or "classic",
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
    **json.loads(environment("SETTINGS") or "{}"),
)
eda = EDA(app)
#: The user's own engine and sessions.
engine = create_engine(environment("DATABASE")) if environment("DATABASE") else None
sessions = sessionmaker(engine)
#: Number of ordering keys of the events.
KEYS = 100
#: Seconds to wait until the process has sent what it committed.
PATIENCE = 60.0


@eda.task(name="bench.quote")
def quote(number: int) -> int:
    """Reply with twice *number*."""
    return 2 * number


@eda.task(name="bench.insert")
def insert_one(session: Session, number: int) -> None:
    """Insert a row in the transaction of the message."""
    marks.started(number)
    session.execute(insert(effects).values(name="bench", number=number))


@eda.task(name="bench.keep", key="key")
def keep(session: Session, key: str, number: int) -> None:
    """Insert a row, in the order of the key."""
    session.execute(insert(effects).values(name=key, number=number))


@eda.task(name="bench.follow", key="key")
def follow(session: Session, key: str, number: int) -> None:
    """Do as ``bench.insert``, in the order of the key."""
    marks.started(number)
    session.execute(insert(effects).values(name="bench", number=number))


@eda.task(name="bench.start")
def start(number: int) -> None:
    """Report the start."""
    marks.started(number)


@eda.task(name="bench.hold")
def hold(number: int) -> None:
    """Report the start, and never finish."""
    marks.started(number)
    time.sleep(600)


@eda.task(name="bench.carry")
def carry(payload: str) -> None:
    """Do nothing; the message carries about 1 KB."""


def note(session: Session, event: Event) -> None:
    """Insert a row in the transaction of the subscription."""
    session.execute(insert(effects).values(name="heard", number=event.data["number"]))


for number in range(int(environment("SUBSCRIPTIONS") or 0)):
    eda.on("bench.#", name=f"bench.hear{number}")(note)


if environment("STEPS"):
    for step in checkpoints.STEPS:
        checkpoints.arm(step, partial(marks.told, step))


# ── requests ────────────────────────────────────────────────────────────────────────────────────


def ask(count: int, seconds: float, address: Any) -> list[float]:
    """Ask sequentially for at most *seconds*; returns the seconds of each round trip."""
    taken: list[float] = []
    for number in range(count):
        marks.told("asked")
        begun = time.perf_counter()
        reply = eda.request("bench.quote", (number,), address=address).get(timeout=20)
        taken.append(time.perf_counter() - begun)
        marks.told("replied")
        assert reply == 2 * number, "somebody else's reply"
        if sum(taken) > seconds:
            break
    return taken


def ask_slowly(count: int, address: Any, pause: float) -> None:
    """As :func:`ask`, with pauses, so that each request runs on an idle machine."""
    for _ in range(count):
        ask(1, 60.0, address)
        time.sleep(pause)


def flood(count: int, address: Any) -> None:
    """Send *count* requests, then wait for all replies."""
    replies = [eda.request("bench.quote", (number,), address=address) for number in range(count)]
    got = [reply.get(timeout=20) for reply in replies]
    assert got == [2 * number for number in range(count)], "a reply is wrong"


# ── publishing ──────────────────────────────────────────────────────────────────────────────────


def fill(count: int) -> None:
    """Publish *count* messages in one transaction."""
    with eda.transaction():
        for _ in range(count):
            carry.delay(PAYLOAD)


def fill_beside_work(count: int, first: int) -> None:
    """Commit *count* transactions of the user's own session, with a row and a message each."""
    for number in range(first, first + count):
        with sessions() as session, eda.transaction(session):
            session.execute(insert(orders).values(number=number))
            carry.delay(PAYLOAD)
            session.commit()


def fill_and_notify(count: int, first: int) -> None:
    """As :func:`fill_beside_work`, with a NOTIFY in each transaction, as some peers do."""
    for number in range(first, first + count):
        with sessions() as session, eda.transaction(session):
            session.execute(insert(orders).values(number=number))
            carry.delay(PAYLOAD)
            session.execute(text("NOTIFY outbox"))
            session.commit()


def work(count: int, first: int) -> None:
    """As :func:`fill_beside_work`, without the messages."""
    for number in range(first, first + count):
        with sessions() as session:
            session.execute(insert(orders).values(number=number))
            session.commit()


def start_after_commit(count: int, pause: float) -> list[list[float]]:
    """Publish *count* messages with pauses; returns the times before and after each commit."""
    moments = []
    for number in range(count):
        with sessions() as session, eda.transaction(session):
            session.execute(insert(effects).values(name="start", number=number))
            start.delay(number)
            before = time.monotonic()
            session.commit()
        moments.append([before, time.monotonic()])
        time.sleep(pause)
    return moments


def publish_starts(count: int, first: int) -> None:
    """Publish *count* messages, each in a transaction of its own with nothing else."""
    for number in range(first, first + count):
        with eda.transaction():
            start.delay(number)


def send_behind_first(count: int, keys: int, name: str) -> int:
    """Send *count* messages of *keys* keys, but not the first one of each key, to be parked.

    Returns:
        The number of messages, with those that :func:`send_first` will send.
    """
    table = eda.databases.tables.outbox
    with eda.transaction():
        for number in range(keys):
            follow.delay(f"{name} {number}", number)
    with eda.databases.engine.begin() as connection:
        connection.execute(update(table).values(available_at=eda.databases.dialect.later(3600.0)))
    with eda.transaction():
        for number in range(keys, keys + count):
            follow.delay(f"{name} {number % keys}", number)
    drain()
    return keys + count


def send_first() -> None:
    """Send the first message of each key."""
    table = eda.databases.tables.outbox
    with eda.databases.engine.begin() as connection:
        connection.execute(update(table).values(available_at=None))
    drain()


def parked() -> int:
    """The number of parked messages."""
    with eda.databases.engine.connect() as connection:
        return eda.ordering.progress.count_parked(connection, follow.name)


def occupy(first: int) -> None:
    """Publish a task that never finishes, and another one."""
    hold.delay(first)
    start.delay(first + 1)


def take_bare(count: int) -> None:
    """Take *count* messages out of the queue and acknowledge each, without a worker."""
    with eda.service.app.connection_for_read() as connection:
        queue = eda.service.app.amqp.queues[app.conf.task_default_queue](connection.default_channel)
        for _ in range(count):
            message = queue.get()
            assert message is not None, "the queue is empty"
            message.ack()


def settle() -> None:
    """Wait until this process has sent everything it committed."""
    deadline = time.monotonic() + PATIENCE
    while eda.outbox.sender._busy():  # ``finish`` gives up after two seconds
        if time.monotonic() > deadline:
            raise TimeoutError(f"{waiting()} messages are still in the outbox")
        time.sleep(0.005)


def waiting() -> int:
    """The number of messages in the outbox."""
    with eda.databases.engine.connect() as connection:
        return int(
            connection.scalar(select(func.count()).select_from(eda.databases.tables.outbox)) or 0
        )


# ── events ──────────────────────────────────────────────────────────────────────────────────────


def emit(count: int, first: int) -> None:
    """Emit *count* events of about 1 KB with a hundred keys, each in its own transaction."""
    for number in range(first, first + count):
        with eda.transaction():
            _emit(number)


def emit_together(count: int, first: int) -> None:
    """Emit *count* events in one transaction."""
    with eda.transaction():
        for number in range(first, first + count):
            _emit(number)


def _emit(number: int) -> None:
    eda.emit("bench.happened", {"number": number, "text": PAYLOAD}, key=number % KEYS)


def subscribe() -> None:
    """Declare the queues of the subscriptions."""
    with eda.service.app.connection_for_write() as connection:
        eda.events.subscriptions.declare(connection.default_channel)


def heard() -> int:
    """The number of effects of events in subscriptions so far; deletes their rows."""
    with eda.databases.engine.begin() as connection:
        return connection.execute(delete(effects).where(effects.c.name == "heard")).rowcount


def read_page() -> int:
    """Read the last thousand events in the order of their positions, all assigned."""
    eda.events.store.assign_positions(eda.databases.engine)
    with eda.databases.engine.connect() as connection:
        last = connection.scalar(select(func.max(eda.databases.tables.events.c.position))) or 0
        return len(eda.events.store.read(connection, after=max(0, last - 1000)))


def fold_stream(key: int) -> int:
    """Count the events of a stream."""
    return eda.fold(f"bench.{key}", 0, lambda number, _: number + 1)


# ── relaying ────────────────────────────────────────────────────────────────────────────────────


def drain() -> int:
    """Send everything in the outbox, as ``celery eda relay --once`` does."""
    return eda.outbox.relay().drain().confirmed


def claim_and_clear(count: int) -> int:
    """Claim and clear *count* messages in batches, as a relay does whose broker costs nothing.

    Within a chain a batch is claimed after the last id of the batch before it; the first batch of
    a chain is claimed from the beginning of the outbox.
    """
    left, batch, owner = count, eda.service.settings.relay_batch, "0" * 32
    pending: Sequence[Pending] = ()
    for place in cycle(range(CHAIN)):
        after = pending[-1].id if place else 0
        with eda.databases.relay_engine.begin() as connection:
            pending = eda.outbox.store.claim(connection, owner, min(batch, left), after=after)
            eda.outbox.store.clear(connection, owner, [each.id for each in pending])
        left -= len(pending)
        if not pending or left <= 0:
            break
    return count - left


def relay_until_told() -> int:
    """Send messages, as ``celery eda relay`` does, until the next line arrives on stdin."""
    relay = eda.outbox.relay()
    thread = threading.Thread(target=relay.run)
    thread.start()
    sys.stdin.readline()
    relay.stop()
    thread.join()
    return 0


# ── handling ────────────────────────────────────────────────────────────────────────────────────


def handle(count: int) -> None:
    """Deliver *count* messages to a reliable task, as a worker's slot does, without a broker."""
    for number in range(count):
        task_id = str(uuid4())
        insert_one.push_request(id=task_id, called_directly=False, **Identity.fresh().headers)
        try:
            insert_one(number)
        finally:
            insert_one.pop_request()


def keep_order(count: int, keys: int) -> None:
    """Publish *count* messages of *keys* keys in one transaction, and deliver each."""
    with eda.transaction():
        for number in range(count):
            keep.delay(f"key {number % keys}", number)
    with eda.databases.relay_engine.begin() as connection:
        pending = eda.outbox.store.claim(connection, "0" * 32, count)
        eda.outbox.store.clear(connection, "0" * 32, [each.id for each in pending])
    assert len(pending) == count, "some are not there"
    for each in pending:
        args, kwargs, _ = json.loads(each.message.body)
        keep.push_request(**{**each.message.headers, "called_directly": False})
        try:
            keep(*args, **kwargs)
        finally:
            keep.pop_request()


def handle_bare(count: int) -> None:
    """Run the statements of that task in *count* transactions of the user's own."""
    for number in range(count):
        with sessions() as session:
            session.execute(insert(effects).values(name="bench", number=number))
            session.commit()


VERBS: dict[str, Any] = {
    each.__name__: each
    for each in (
        ask,
        ask_slowly,
        flood,
        fill,
        fill_beside_work,
        work,
        start_after_commit,
        settle,
        waiting,
        drain,
        relay_until_told,
        fill_and_notify,
        publish_starts,
        send_behind_first,
        send_first,
        parked,
        occupy,
        take_bare,
        handle,
        handle_bare,
        keep_order,
        claim_and_clear,
        emit,
        emit_together,
        subscribe,
        heard,
        read_page,
        fold_stream,
    )
}

if __name__ == "__main__":
    serve(VERBS)
