"""Plain Celery; ``BENCH_LATE`` sets late acknowledgement, ``BENCH_EDA`` adds celery_eda."""

from __future__ import annotations

import json
import time
from typing import Any

from celery import Celery, Task, chain
from kombu import Consumer, Queue
from sqlalchemy import create_engine, insert
from sqlalchemy.orm import sessionmaker

from benchmarks.contestants import marks
from benchmarks.contestants.serving import PAYLOAD, environment, serve
from celery_eda import EDA
from tests.faults.programs.tables import effects, orders

app = Celery(
    "plain",
    broker=environment("BROKER"),
    backend=environment("BACKEND") or None,
    set_as_current=False,
)
app.conf.update(
    task_default_queue=environment("QUEUE") or "plain",
    task_default_queue_type=environment("QUEUE_TYPE") or "classic",
    task_acks_late=bool(environment("LATE")),
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
    **json.loads(environment("SETTINGS") or "{}"),
)
if environment("EDA"):
    app.conf.update(eda_database_url=environment("DATABASE"))
    EDA(app)
engine = create_engine(environment("DATABASE")) if environment("DATABASE") else None
sessions = sessionmaker(engine)


@app.task(name="plain.quote")
def quote(number: int) -> int:
    return 2 * number


@app.task(name="plain.answer", bind=True, ignore_result=True)
def answer(self: Task, number: int) -> None:
    """Reply with twice *number* to the queue that the request names."""
    with app.amqp.producer_pool.acquire(block=True) as producer:
        reply = {"result": 2 * number}
        producer.publish(reply, routing_key=self.request.reply_to, correlation_id=self.request.id)


@app.task(name="plain.insert", ignore_result=True)
def insert_one(number: int) -> None:
    """Insert a row in a transaction of its own."""
    marks.started(number)
    with sessions() as session:
        session.execute(insert(effects).values(name="bench", number=number))
        session.commit()


@app.task(name="plain.step", ignore_result=True)
def step(number: int) -> None:
    """Insert a row of a flow in a transaction of its own."""
    with sessions() as session:
        session.execute(insert(effects).values(name="step", number=number))
        session.commit()


@app.task(name="plain.start", ignore_result=True)
def start(number: int) -> None:
    """Report the start."""
    marks.started(number)


@app.task(name="plain.carry", ignore_result=True)
def carry(payload: str) -> None:
    """Do nothing; the message carries about 1 KB."""


# ── requests ────────────────────────────────────────────────────────────────────────────────────


def ask(count: int, seconds: float) -> list[float]:
    """Ask sequentially for at most *seconds*; returns the seconds of each round trip."""
    taken: list[float] = []
    for number in range(count):
        begun = time.perf_counter()
        reply = quote.delay(number).get(timeout=20)
        taken.append(time.perf_counter() - begun)
        assert reply == 2 * number, "somebody else's reply"
        if sum(taken) > seconds:
            break
    return taken


def flood(count: int) -> None:
    """Send *count* requests, then wait for all replies."""
    replies = [quote.delay(number) for number in range(count)]
    got = [reply.get(timeout=20) for reply in replies]
    assert got == [2 * number for number in range(count)], "a reply is wrong"


def ask_over_temporary_queues(count: int, seconds: float) -> list[float]:
    """As :func:`ask`, each reply over an exclusive queue of its own."""
    taken: list[float] = []
    with app.connection_for_read() as connection, connection.channel() as channel:
        for number in range(count):
            begun = time.perf_counter()
            name = channel.queue_declare(queue="", exclusive=True, auto_delete=True).queue
            answer.apply_async((number,), reply_to=name)
            arrived: list[Any] = []
            queue = Queue(name, exclusive=True, auto_delete=True, no_declare=True)
            with Consumer(channel, [queue], no_ack=True, callbacks=[_keep(arrived)]):
                while not arrived:
                    connection.drain_events(timeout=20)
            channel.queue_delete(name)
            taken.append(time.perf_counter() - begun)
            assert arrived == [{"result": 2 * number}], "somebody else's reply"
            if sum(taken) > seconds:
                break
    return taken


def _keep(arrived: list[Any]) -> Any:
    return lambda body, _: arrived.append(body)


# ── publishing ──────────────────────────────────────────────────────────────────────────────────


def fill(count: int) -> None:
    """Publish *count* messages directly to the broker."""
    for _ in range(count):
        carry.delay(PAYLOAD)


def fill_beside_work(count: int, first: int) -> None:
    """Commit *count* transactions of one row, and publish a message after each commit."""
    for number in range(first, first + count):
        with sessions() as session:
            session.execute(insert(orders).values(number=number))
            session.commit()
        carry.delay(PAYLOAD)


def work(count: int, first: int) -> None:
    """As :func:`fill_beside_work`, without the messages."""
    for number in range(first, first + count):
        with sessions() as session:
            session.execute(insert(orders).values(number=number))
            session.commit()


def chains(count: int, first: int) -> None:
    """Begin *count* flows of five steps."""
    for number in range(first, first + count):
        chain([step.si(number) for _ in range(5)]).delay()


def publish_starts(count: int, first: int) -> None:
    """Publish *count* messages."""
    for number in range(first, first + count):
        start.delay(number)


def start_at_once(count: int, pause: float) -> list[list[float]]:
    """Publish *count* messages with pauses; returns the times before and after each call."""
    moments = []
    for number in range(count):
        before = time.monotonic()
        start.delay(number)
        moments.append([before, time.monotonic()])
        time.sleep(pause)
    return moments


VERBS: dict[str, Any] = {
    each.__name__: each
    for each in (
        ask,
        flood,
        ask_over_temporary_queues,
        fill,
        fill_beside_work,
        work,
        start_at_once,
        chains,
        publish_starts,
    )
}

if __name__ == "__main__":
    serve(VERBS)
