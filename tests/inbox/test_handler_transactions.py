"""Handlers that meddle with the transaction of their message, and ``async def`` handlers."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import pytest
from celery import Task
from sqlalchemy import insert, text, update
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from celery_eda.errors import BrokenTransaction
from tests.faults.programs.tables import effects
from tests.support.worker_slot import Slot, unique

# ── handlers that meddle with the transaction ────────────────────────────────────────────────────


def test_a_swallowed_error_of_a_statement_costs_nothing_or_is_told(slot: Slot) -> None:
    @slot.task
    def careless(session: Session, number: int) -> None:
        slot.write(number)
        with suppress(SQLAlchemyError):
            session.execute(text("SELECT nonsense FROM nowhere"))

    careless.delay(7)
    slot.work()

    if slot.database.vendor == "postgresql":  # which gives the whole transaction up
        assert [each.error_type for each in slot.dead()] == ["BrokenTransaction"]
        assert slot.effects() == []
    else:
        assert slot.effects() == [7]


def test_a_swallowed_deadlock_is_told(slot: Slot) -> None:
    if slot.database.vendor == "sqlite":
        pytest.skip("SQLite has no row locks")
    with slot.engine.begin() as connection:
        connection.execute(insert(unique), [{"number": 1}, {"number": 2}])
    first, second = (update(unique).where(unique.c.number == n).values(number=n) for n in (1, 2))
    rival_has_second, handler_has_first = threading.Event(), threading.Event()

    def rival() -> None:
        with slot.engine.begin() as connection:
            if slot.database.vendor == "postgresql":  # gives up the one that first looks round
                connection.execute(text("SET LOCAL deadlock_timeout = '60s'"))
            # The one that has written less is given up by MariaDB.
            connection.execute(insert(effects), [{"name": "rival", "number": 0}] * 50)
            connection.execute(second)
            rival_has_second.set()
            handler_has_first.wait(30)
            connection.execute(first)

    @slot.task
    def careless(session: Session, number: int) -> None:
        slot.write(number)
        session.execute(first)
        handler_has_first.set()
        rival_has_second.wait(30)
        with suppress(OperationalError):
            session.execute(second)
        if slot.database.vendor == "mariadb":
            slot.write(number + 1)

    thread = threading.Thread(target=rival)
    thread.start()
    careless.delay(7)
    (ending,) = slot.work()
    thread.join()

    assert isinstance(ending, BrokenTransaction)
    assert set(slot.effects()) == {0}
    assert slot.outcomes() == [(0, "dead")]


def test_an_error_inside_a_savepoint_may_be_swallowed(slot: Slot) -> None:
    @slot.task
    def careful(session: Session, number: int) -> None:
        slot.write(number)
        session.execute(insert(unique).values(number=number))
        try:
            with session.begin_nested():
                slot.write(number + 1)
                session.execute(insert(unique).values(number=number))
        except IntegrityError:
            slot.write(number + 2)

    careful.delay(7)

    assert slot.work() == [None]
    assert slot.effects() == [7, 9]


def test_a_handler_that_rolls_back_is_a_dead_letter_that_says_so(slot: Slot) -> None:
    @slot.task
    def rebel(session: Session, number: int) -> None:
        slot.write(number)
        session.rollback()
        slot.write(number + 1)

    rebel.delay(7)
    (ending,) = slot.work()

    assert isinstance(ending, BrokenTransaction)
    assert "begin_nested" in str(ending)
    assert slot.effects() == []
    assert slot.outcomes() == [(0, "dead")]


def test_a_session_may_be_committed_but_nothing_is_before_the_message(slot: Slot) -> None:
    @slot.task
    def eager(session: Session, number: int) -> None:
        slot.write(number)
        session.commit()
        assert slot.effects() == []
        slot.write(number + 1)
        if number == 10:
            raise ValueError(number)

    eager.delay(7)
    eager.delay(10)
    slot.work()

    assert slot.effects() == [7, 8]
    assert len(slot.dead()) == 1


@pytest.mark.parametrize("swallowed", [False, True])
def test_a_handler_cannot_commit_its_connection(slot: Slot, swallowed: bool) -> None:
    @slot.task
    def rebel(session: Session, number: int) -> None:
        slot.write(number)
        try:
            session.connection().commit()
        except BrokenTransaction:
            if not swallowed:
                raise

    rebel.delay(7)
    (ending,) = slot.work()

    assert isinstance(ending, BrokenTransaction)
    assert slot.effects() == []
    assert slot.outcomes() == [(0, "dead")]


def test_a_transaction_inside_a_task_is_a_savepoint_of_its_own(slot: Slot) -> None:
    @slot.task
    def note(number: int) -> None:
        slot.write(number)

    @slot.task
    def nested(number: int) -> None:
        with slot.eda.transaction() as session:
            session.execute(insert(effects).values(name="effect", number=number))
            note.delay(number + 1)
        with suppress(LookupError), slot.eda.transaction() as session:
            session.execute(insert(effects).values(name="effect", number=number + 2))
            note.delay(number + 3)
            raise LookupError
        if number == 20:
            raise ValueError(number)

    nested.delay(10)
    nested.delay(20)
    slot.work()

    assert slot.effects() == [10, 11]


def test_a_session_of_an_attached_sessionmaker_joins(slot: Slot) -> None:
    sessions = sessionmaker(slot.engine)
    slot.eda.attach(sessions)

    @slot.task
    def note(number: int) -> None:
        slot.write(number)

    @slot.task
    def legacy(number: int) -> None:
        with sessions() as session:
            session.execute(insert(effects).values(name="effect", number=number))
            note.delay(number + 1)
            session.commit()
        if number == 20:
            raise ValueError(number)

    legacy.delay(10)
    legacy.delay(20)
    slot.work()

    assert slot.effects() == [10, 11]


def test_an_asynchronous_session_of_an_attached_sessionmaker_joins(slot: Slot) -> None:
    drivers = {"postgresql": "postgresql+psycopg", "sqlite": "sqlite+aiosqlite"}
    if slot.database.vendor not in drivers:
        pytest.skip("no asyncio driver for MariaDB is supported")
    url = slot.engine.url.set(drivername=drivers[slot.database.vendor])
    sessions = async_sessionmaker(create_async_engine(url))
    slot.eda.attach(sessions)

    @slot.task
    async def legacy(number: int) -> None:
        async with sessions() as session:
            await session.execute(insert(effects).values(name="effect", number=number))
            await session.commit()
        if number == 20:
            raise ValueError(number)

    legacy.delay(10)
    legacy.delay(20)
    slot.work()

    assert slot.effects() == [10]
    assert [each.error for each in slot.dead()] == ["20"]


# ── async def ────────────────────────────────────────────────────────────────────────────────────


def test_an_async_handler_and_its_child_tasks_publish_into_its_transaction(slot: Slot) -> None:
    @slot.task
    def note(number: int) -> None:
        slot.write(number)

    @slot.task
    async def fan_out(session: Session, number: int) -> int:
        session.execute(insert(effects).values(name="effect", number=number))

        async def child(n: int) -> None:
            await asyncio.sleep(0)
            note.delay(n)

        await asyncio.gather(*(child(number + n) for n in (1, 2, 3)))
        if number == 20:
            raise ValueError(number)
        return number

    fan_out.delay(10)
    fan_out.delay(20)
    (message, _) = messages = slot.sent()
    for each in messages:
        slot.deliver(each)
    slot.work()

    assert slot.effects() == [10, 11, 12, 13]
    assert slot.result(message).result == 10


def test_an_async_handler_can_be_retried(slot: Slot) -> None:
    @slot.task(bind=True)
    async def flaky(self: Task, session: Session, number: int) -> None:
        slot.write(number + self.request.retries)
        await asyncio.sleep(0)
        if not self.request.retries:
            raise self.retry()

    @slot.task(bind=True, autoretry_for=(LookupError,))
    async def automatic(self: Task, number: int) -> None:
        slot.write(number + self.request.retries)
        await asyncio.sleep(0)
        if not self.request.retries:
            raise LookupError

    flaky.delay(10)
    automatic.delay(20)
    slot.work()

    assert slot.effects() == [11, 21]


def test_an_async_task_can_be_awaited_by_another(slot: Slot) -> None:
    @slot.task
    async def inner(session: Session, number: int) -> int:
        await asyncio.sleep(0)
        slot.write(number)
        return number

    @slot.task
    async def outer(number: int) -> int:
        return 1 + await inner(number)

    outer.delay(7)
    (message,) = slot.sent()
    slot.deliver(message)

    assert slot.result(message).result == 8
    assert slot.effects() == [7]
