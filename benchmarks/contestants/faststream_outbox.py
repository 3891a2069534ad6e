"""faststream-outbox, tuned: 20 workers, batches of 500, deletes of 100, relaying to RabbitMQ."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from faststream.rabbit import RabbitBroker, RabbitQueue
from faststream_outbox import OutboxBroker, make_outbox_table
from sqlalchemy import MetaData, func, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from benchmarks.contestants.serving import PAYLOAD, environment, serve

logging.disable(logging.INFO)
loop = asyncio.new_event_loop()
metadata = MetaData()
table = make_outbox_table(metadata, table_name="faststream_outbox")
url = environment("DATABASE").replace("+psycopg", "+asyncpg")
engine = create_async_engine(url, pool_size=30)  # one for each worker, and some spare
sessions = async_sessionmaker(engine, expire_on_commit=False)
producer = OutboxBroker(engine, outbox_table=table)
rabbit = RabbitBroker(environment("BROKER"), logger=None)
QUEUE = "faststream"
PATIENCE = 60.0


def prepare() -> None:
    """Create its table, and connect."""
    loop.run_until_complete(_prepare())


async def _prepare() -> None:
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await rabbit.start()
    queue = RabbitQueue(
        environment("QUEUE") or "relayed",
        durable=True,
        arguments={"x-queue-type": environment("QUEUE_TYPE") or "classic"},
    )
    await rabbit.declare_queue(queue)


def fill(count: int) -> None:
    """Publish *count* messages in one transaction."""
    loop.run_until_complete(_fill(count))


async def _fill(count: int) -> None:
    async with sessions() as session, session.begin():
        for start in range(0, count, 1000):
            bodies = [PAYLOAD] * min(1000, count - start)
            await producer.publish_batch(*bodies, queue=QUEUE, session=session)


def drain() -> int:
    """Send everything in the outbox; the time includes start and stop of the relay."""
    return loop.run_until_complete(_drain())


async def _drain() -> int:
    count = await _waiting()
    broker = OutboxBroker(engine, outbox_table=table, logger=None)

    @broker.subscriber(
        QUEUE,
        max_workers=20,
        fetch_batch_size=500,
        terminal_flush_batch_size=100,
        min_fetch_interval=0.01,
    )
    async def relay(body: str) -> None:
        await rabbit.publish(body, queue=environment("QUEUE") or "relayed", persist=True)

    await broker.start()
    deadline = time.monotonic() + PATIENCE
    while await _waiting():
        if time.monotonic() > deadline:
            raise TimeoutError("the outbox does not get empty")
        await asyncio.sleep(0.005)
    await broker.stop()
    return count


async def _waiting() -> int:
    async with engine.connect() as connection:
        return int(await connection.scalar(select(func.count()).select_from(table)) or 0)


VERBS: dict[str, Callable[..., Any | Awaitable[Any]]] = {
    each.__name__: each for each in (prepare, fill, drain)
}

if __name__ == "__main__":
    serve(VERBS)
