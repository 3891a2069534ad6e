"""Transactions whose code runs in several contexts, as frameworks and threads make them."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.orm import Session, sessionmaker

from celery_eda.outbox import publisher
from celery_eda.outbox.transactions import unattached
from tests.faults.programs.tables import effects
from tests.support.worker_slot import Slot

Dependency = Callable[[Slot], AbstractContextManager[Session]]


class Mishap(Exception):
    """An error of the user's code."""


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test sees warnings that come once in a process."""
    monkeypatch.setattr(publisher, "_warned", set())
    monkeypatch.setattr(unattached, "_warned", set())


@pytest.fixture
def mail(slot: Slot) -> Any:
    """A reliable task."""

    @slot.task
    def mail(number: int) -> None:
        pass

    return mail


# ── dependencies of FastAPI ─────────────────────────────────────────────────────────────────


def own(slot: Slot) -> AbstractContextManager[Session]:
    return slot.eda.transaction()


@contextmanager
def joined(slot: Slot) -> Iterator[Session]:
    with sessionmaker(slot.engine)() as session, slot.eda.transaction(session):
        yield session
        session.commit()


@contextmanager
def attached(slot: Slot) -> Iterator[Session]:
    sessions = sessionmaker(slot.engine)
    slot.eda.attach(sessions)
    with sessions() as session:
        yield session
        session.commit()


def request(
    dependency: AbstractContextManager[Session], endpoint: Callable[[Session], None]
) -> None:
    """Call both as FastAPI calls `def` functions: in threads, each in its copy of the context."""

    async def call() -> None:
        session = await asyncio.to_thread(dependency.__enter__)
        try:
            await asyncio.to_thread(endpoint, session)
        except BaseException as error:
            await asyncio.to_thread(dependency.__exit__, type(error), error, error.__traceback__)
            raise
        await asyncio.to_thread(dependency.__exit__, None, None, None)

    contextvars.copy_context().run(asyncio.run, call())


def request_with_coroutine(
    dependency: AbstractContextManager[Session], endpoint: Callable[[Session], None]
) -> None:
    """A `def` dependency in a thread, and an `async def` endpoint in the event loop."""

    async def call() -> None:
        session = await asyncio.to_thread(dependency.__enter__)
        try:
            endpoint(session)
        except BaseException as error:
            await asyncio.to_thread(dependency.__exit__, type(error), error, error.__traceback__)
            raise
        await asyncio.to_thread(dependency.__exit__, None, None, None)

    contextvars.copy_context().run(asyncio.run, call())


@pytest.mark.parametrize("used_before", [True, False])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("serve", [request, request_with_coroutine])
@pytest.mark.parametrize("dependency", [own, joined, attached])
def test_a_message_belongs_to_the_transaction_that_a_dependency_has_opened(
    slot: Slot, mail: Any, dependency: Dependency, serve: Any, fails: bool, used_before: bool
) -> None:
    @contextmanager
    def authenticated(opened: AbstractContextManager[Session]) -> Iterator[Session]:
        with opened as session:
            if used_before:
                session.execute(select(effects)).all()
            yield session

    def endpoint(session: Session) -> None:
        session.execute(insert(effects).values(name="effect", number=1))
        mail.delay(1)
        if fails:
            raise Mishap

    if slot.database.vendor == "sqlite" and serve is request_with_coroutine:
        pytest.skip("a connection of SQLite belongs to its thread")
    with suppress(Mishap):
        serve(authenticated(dependency(slot)), endpoint)

    assert (slot.effects(), slot.waiting()) == (([], []) if fails else ([1], ["mail"]))


def test_a_message_published_before_the_session_is_used_is_reported(
    slot: Slot, mail: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def endpoint(session: Session) -> None:
        mail.delay(1)
        session.execute(text("SELECT 1"))

    request(own(slot), endpoint)

    assert "mail was published before the session in use was used here" in caplog.text


# ── threads ─────────────────────────────────────────────────────────────────────────────────


def in_thread(body: Callable[[], Any]) -> None:
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()


def test_a_thread_of_a_handler_that_publishes_is_reported(
    slot: Slot, mail: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @slot.task
    def work() -> None:
        in_thread(lambda: slot.app.send_task("elsewhere.mail"))
        raise Mishap

    with slot.eda.transaction():
        work.delay()
    slot.deliver(slot.sent()[0])

    assert "elsewhere.mail is published from another thread than that of the handler" in caplog.text


def test_a_thread_with_a_copy_of_the_context_takes_part(
    slot: Slot, mail: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @slot.task
    def work() -> None:
        here = contextvars.copy_context()
        in_thread(lambda: here.run(mail.delay, 1))
        raise Mishap

    with slot.eda.transaction():
        work.delay()
    slot.deliver(slot.sent()[0])

    assert slot.waiting() == []
    assert "another thread" not in caplog.text


# ── work apart from the message ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["session", "connection"])
def test_work_that_a_handler_commits_apart_from_its_message_is_reported(
    slot: Slot, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    @slot.task
    def own_session() -> None:
        statement = insert(effects).values(name="effect", number=1)
        if kind == "session":
            with Session(slot.engine) as session:
                session.execute(statement)
                session.commit()
        else:
            with slot.engine.begin() as connection:
                connection.execute(statement)

    with slot.eda.transaction():
        own_session.delay()
    slot.deliver(slot.sent()[0])

    assert caplog.text.count("The handler of own_session commits work apart") == 1


def test_a_handler_that_reads_apart_or_publishes_outside_is_not_reported(
    slot: Slot, mail: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @slot.task
    def careful() -> None:
        slot.write(1)
        with slot.engine.begin() as connection:
            connection.execute(select(effects)).all()

    @slot.task
    def loud() -> None:
        with slot.eda.outside():
            mail.delay(1)

    with slot.eda.transaction():
        careful.delay()
        loud.delay()
    for message in slot.sent():
        slot.deliver(message)

    assert slot.effects() == [1]
    assert "apart" not in caplog.text
