"""Messages share the fate of an asynchronous session's or connection's transaction."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    suppress,
)
from typing import Any

import pytest
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)

from celery_eda.outbox import Outbox
from celery_eda.outbox.transactions import join
from tests.outbox.test_join import publish_on
from tests.support.service import AsyncService, Order

AsyncOpening = Callable[[AsyncEngine, Outbox], AbstractAsyncContextManager[Any]]


@asynccontextmanager
async def joined_async_session(engine: AsyncEngine, store: Outbox) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine) as session, join.scope(session, store):
        yield session


@asynccontextmanager
async def joined_async_connection(
    engine: AsyncEngine, store: Outbox
) -> AsyncIterator[AsyncConnection]:
    async with engine.connect() as connection, join.scope(connection, store):
        yield connection


both_async = pytest.mark.parametrize("opening", [joined_async_session, joined_async_connection])


@both_async
def test_asynchronous_transactions_decide_their_own_messages(
    async_service: AsyncService, opening: AsyncOpening
) -> None:
    async def body(engine: AsyncEngine) -> None:
        async with opening(engine, async_service.store) as target:
            async_service.publish("a")
            await target.commit()
            await target.execute(insert(Order).values(name="b"))
            async_service.publish("b")
            await target.rollback()
            async_service.publish("c")
            await target.rollback()
            await target.execute(insert(Order).values(name="d"))
            async_service.publish("d")
            await target.commit()

    async_service.run(body)

    assert (async_service.orders, async_service.sent) == ("d", "ad")
    assert async_service.handed_off == ["a", "d"]


@both_async
def test_what_is_published_in_an_asynchronous_savepoint_vanishes_with_it(
    async_service: AsyncService, opening: AsyncOpening
) -> None:
    async def body(engine: AsyncEngine) -> None:
        async with opening(engine, async_service.store) as target, target.begin():
            async_service.publish("a")
            with suppress(KeyError):
                async with target.begin_nested():
                    async_service.publish("b")
                    raise KeyError
            async with target.begin_nested():
                async_service.publish("c")

    async_service.run(body)

    assert async_service.sent == "ac"


def test_an_asynchronous_session_publishes_in_its_events(async_service: AsyncService) -> None:
    async def body(engine: AsyncEngine) -> None:
        async with joined_async_session(engine, async_service.store) as session:
            publish_on(session.sync_session, "after_flush", async_service)
            session.add(Order(name="x"))
            await session.run_sync(lambda _: async_service.publish("a"))
            await session.commit()

    async_service.run(body)

    assert async_service.sent == "ah"


def test_an_asynchronous_session_on_a_joined_connection_sets_its_savepoint_first(
    async_service: AsyncService,
) -> None:
    async def body(engine: AsyncEngine) -> None:
        async with engine.begin() as connection, join.scope(connection, async_service.store):
            session = AsyncSession(connection)
            with suppress(KeyError):
                async with session.begin_nested():
                    async_service.publish("a")
                    raise KeyError
            async_service.publish("b")

    async_service.run(body)

    assert async_service.sent == "b"


def test_a_child_task_is_outside_and_a_thread_on_its_behalf_is_not(
    async_service: AsyncService,
) -> None:
    async def publish(name: str) -> None:
        async_service.publish(name)

    async def body(engine: AsyncEngine) -> None:
        async with joined_async_session(engine, async_service.store) as session:
            await publish("a")
            await asyncio.create_task(publish("b"))
            await asyncio.to_thread(async_service.publish, "c")
            await session.commit()

    async_service.run(body)

    assert (async_service.sent, async_service.outside) == ("ac", ["b"])


def test_concurrent_tasks_have_their_own_transactions(async_service: AsyncService) -> None:
    async def body(engine: AsyncEngine) -> None:
        async def work(name: str) -> None:
            async with joined_async_session(engine, async_service.store) as session:
                async_service.publish(name)
                await asyncio.sleep(0)
                await session.execute(text("SELECT 1"))
                await (session.commit() if name in "ac" else session.rollback())

        await asyncio.gather(*map(work, "abcd"))

    async_service.run(body)

    assert async_service.sent == "ac"


def test_a_cancelled_task_sends_nothing(
    async_service: AsyncService, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(engine: AsyncEngine) -> None:
        published = asyncio.Event()

        async def work() -> None:
            async with joined_async_session(engine, async_service.store) as session:
                await session.execute(insert(Order).values(name="a"))
                async_service.publish("a")
                published.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(work())
        await published.wait()
        task.cancel()
        await asyncio.wait([task])

    async_service.run(body)

    assert (async_service.orders, async_service.sent) == ("", "")
    assert "not sent: a" in caplog.text


def test_a_plain_with_block_joins_an_asynchronous_session_too(
    async_service: AsyncService,
) -> None:
    async def body(engine: AsyncEngine) -> None:
        registry = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
        with join.scope(registry, async_service.store):
            async_service.publish("a")
        await registry.commit()
        await registry.remove()

    async_service.run(body)

    assert async_service.sent == "a"


def test_greenlet_is_only_needed_for_asyncio() -> None:
    program = "import sys; sys.modules['greenlet'] = None; import celery_eda"

    subprocess.run([sys.executable, "-c", program], check=True)
