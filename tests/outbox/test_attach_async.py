"""Asynchronous sessions of an attached factory send what they would be expected to send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)

from celery_eda.outbox.transactions import attach
from tests.outbox.test_attach import Mishap, delivery
from tests.support.service import AsyncService, Order


def attached(service: AsyncService, engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    factory = async_sessionmaker(engine)
    attach.attach(factory, service.store)
    return factory


def test_asynchronous_code_sends_what_it_means_to_send(async_service: AsyncService) -> None:
    async def body(engine: AsyncEngine) -> None:
        sessions = attached(async_service, engine)
        async with sessions() as session:
            async_service.publish("a")
            session.add(Order(name="a"))
            await session.commit()
            async_service.publish("b")
        async with sessions() as session:
            await session.scalars(select(Order))
            async_service.publish("c")
        async with sessions() as session:
            session.add(Order(name="d"))
            async_service.publish("d")
            await session.rollback()
        async with sessions.begin():
            async_service.publish("e")
        with suppress(Mishap):
            async with sessions.begin():
                async_service.publish("f")
                raise Mishap

    async_service.run(body)

    assert (async_service.orders, async_service.sent) == ("a", "abce")
    assert async_service.outside == []


@pytest.mark.parametrize("with_block", [True, False])
def test_an_exception_that_ends_an_asynchronous_session_drops_what_it_published(
    async_service: AsyncService, with_block: bool
) -> None:
    async def body(engine: AsyncEngine) -> None:
        session = attached(async_service, engine)()
        with suppress(Mishap):
            if with_block:
                async with session:
                    async_service.publish("a")
                    raise Mishap
            try:
                async_service.publish("a")
                raise Mishap
            finally:
                await session.close()

    async_service.run(body)

    assert (async_service.sent, async_service.outside) == ("", [])


def test_a_block_that_timed_out_drops_what_it_published(async_service: AsyncService) -> None:
    async def body(engine: AsyncEngine) -> None:
        async def work() -> None:
            async with attached(async_service, engine)():
                async_service.publish("a")
                await asyncio.sleep(60)

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(work(), 0.1)

    async_service.run(body)

    assert async_service.sent == ""


def test_a_session_from_an_asynchronous_generator_captures(async_service: AsyncService) -> None:
    async def body(engine: AsyncEngine) -> None:
        @asynccontextmanager
        async def dependency() -> AsyncIterator[AsyncSession]:
            async with attached(async_service, engine)() as session:
                yield session

        async with dependency() as session:
            async_service.publish("a")
            await session.commit()
        async_service.publish("b")

    async_service.run(body)

    assert (async_service.sent, async_service.outside) == ("a", ["b"])


def test_concurrent_tasks_have_their_own_sessions(async_service: AsyncService) -> None:
    async def body(engine: AsyncEngine) -> None:
        sessions = attached(async_service, engine)

        async def work(name: str) -> None:
            async with sessions() as session:
                async_service.publish(name)
                await asyncio.sleep(0)
                await (session.commit() if name in "ac" else session.rollback())

        await asyncio.gather(*map(work, "abcd"))

    async_service.run(body)

    assert async_service.sent == "ac"


def test_a_child_task_is_outside_and_a_thread_on_its_behalf_is_not(
    async_service: AsyncService,
) -> None:
    async def publish(name: str) -> None:
        async_service.publish(name)

    async def body(engine: AsyncEngine) -> None:
        async with attached(async_service, engine)() as session:
            await asyncio.create_task(publish("a"))
            await asyncio.to_thread(async_service.publish, "b")
            await session.commit()

    async_service.run(body)

    assert (async_service.sent, async_service.outside) == ("b", ["a"])


def test_an_asynchronous_scoped_session_captures(async_service: AsyncService) -> None:
    async def body(engine: AsyncEngine) -> None:
        registry = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
        attach.attach(registry, async_service.store)
        registry.add(Order(name="a"))
        async_service.publish("a")
        await registry.commit()
        await registry.remove()

    async_service.run(body)

    assert async_service.sent == "a"


def test_an_asynchronous_session_takes_part_in_the_message_in_progress(
    async_service: AsyncService,
) -> None:
    async def body(engine: AsyncEngine) -> None:
        sessions = attached(async_service, engine)
        with delivery(async_service):
            async with sessions() as session:
                session.add(Order(name="a"))
                async_service.publish("a")
                await session.commit()
                assert (await session.scalars(select(Order.name))).all() == ["a"]
            async with sessions() as session:
                await session.execute(insert(Order).values(name="b"))
                async_service.publish("b")
                await session.rollback()
        with suppress(Mishap), delivery(async_service):
            async with sessions.begin() as session:
                session.add(Order(name="c"))
                async_service.publish("c")
            raise Mishap

    async_service.run(body)

    assert (async_service.orders, async_service.sent) == ("a", "a")
