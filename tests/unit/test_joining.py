"""Messages share the fate of the Session's or Connection's transaction they were published in."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import Pool

from celery_eda import joining
from celery_eda.errors import AutocommitTransaction, TwoEngines
from celery_eda.message import Message
from celery_eda.transaction import Store
from tests.unit.conftest import AsyncService, Order, Service

Opening = Callable[[Service], AbstractContextManager[Any]]


@contextmanager
def joined_session(service: Service) -> Iterator[Session]:
    with Session(service.engine) as session, joining.scope(session, service.store):
        yield session


@contextmanager
def joined_connection(service: Service) -> Iterator[Connection]:
    with service.engine.connect() as connection, joining.scope(connection, service.store):
        yield connection


def order(target: Any, name: str) -> None:
    """Write a row of the service's own, right now."""
    target.execute(insert(Order).values(name=name))


both = pytest.mark.parametrize("opening", [joined_session, joined_connection])


# ── commit and rollback ─────────────────────────────────────────────────────────────────────


@both
def test_a_message_published_before_any_statement_is_sent_with_the_commit(
    service: Service, opening: Opening
) -> None:
    with opening(service) as target:
        service.publish("a")
        before = service.sent
        target.commit()

    assert (before, service.sent, service.handed_off) == ("", "a", ["a"])


@both
def test_each_transaction_decides_its_own_messages(service: Service, opening: Opening) -> None:
    with opening(service) as target:
        for name in "ab":
            order(target, name)
            service.publish(name)
            target.commit()
        order(target, "c")
        service.publish("c")
        target.rollback()

    assert (service.orders, service.sent, service.handed_off) == ("ab", "ab", ["a", "b"])


@both
def test_a_rollback_with_no_statement_drops_what_was_published_before(
    service: Service, opening: Opening
) -> None:
    with opening(service) as target:
        service.publish("a")
        target.rollback()
        service.publish("b")
        target.commit()

    assert service.sent == "b"


@both
def test_publishing_counts_as_the_first_statement(service: Service, opening: Opening) -> None:
    with opening(service) as target:
        service.publish("a")
        with pytest.raises(InvalidRequestError, match=r"already begun|already (been )?initialized"):
            target.begin()


@both
def test_publishing_in_an_explicit_block_is_sent_when_it_ends(
    service: Service, opening: Opening
) -> None:
    with opening(service) as target, target.begin():
        service.publish("a")

    assert service.sent == "a"


@both
def test_an_exception_in_an_explicit_block_drops_its_messages(
    service: Service, opening: Opening
) -> None:
    with opening(service) as target, suppress(KeyError), target.begin():
        service.publish("a")
        raise KeyError

    assert service.sent == ""


def test_a_message_follows_its_transaction_when_the_block_ends_first(service: Service) -> None:
    with service.engine.begin() as connection, joining.scope(connection, service.store):
        service.publish("a")
    with Session(service.engine) as session, session.begin():
        with joining.scope(session, service.store):
            service.publish("b")
        service.publish("c")

    assert (service.sent, service.outside) == ("ab", ["c"])
    assert service.handed_off == ["a", "b"]


def test_a_session_that_is_closed_without_a_commit_drops_its_messages_aloud(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    with joined_session(service):
        service.publish("a")

    assert service.sent == ""
    assert "not sent: a" in caplog.text


def test_a_rollback_drops_in_silence(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with joined_session(service) as session:
        service.publish("a")
        session.rollback()

    assert caplog.records == []


# ── savepoints ──────────────────────────────────────────────────────────────────────────────


@both
def test_what_is_published_in_a_savepoint_vanishes_with_it(
    service: Service, opening: Opening
) -> None:
    with opening(service) as target:
        service.publish("a")
        with target.begin_nested():
            service.publish("b")
            inner = target.begin_nested()
            service.publish("c")
            inner.rollback()
            service.publish("d")
        outer = target.begin_nested()
        service.publish("e")
        with target.begin_nested():
            service.publish("f")
        outer.rollback()
        service.publish("g")
        target.commit()

    assert service.sent == "abdg"


@both
def test_rolling_back_with_savepoints_open_drops_everything(
    service: Service, opening: Opening
) -> None:
    with opening(service) as target:
        order(target, "a")
        service.publish("a")
        target.begin_nested()
        order(target, "b")
        service.publish("b")
        target.begin_nested()
        service.publish("c")
        target.rollback()
        service.publish("d")
        target.commit()

    assert (service.orders, service.sent) == ("", "d")


@both
def test_committing_with_savepoints_open_keeps_everything(
    service: Service, opening: Opening
) -> None:
    with opening(service) as target:
        service.publish("a")
        target.begin_nested()
        order(target, "b")
        service.publish("b")
        target.commit()

    assert (service.orders, service.sent) == ("b", "ab")


@both
def test_leaving_a_block_with_savepoints_open_keeps_everything(
    service: Service, opening: Opening
) -> None:
    with opening(service) as target, target.begin():
        service.publish("a")
        target.begin_nested()
        service.publish("b")

    assert service.sent == "ab"


def test_a_flush_error_in_a_savepoint_drops_what_was_published_in_it(service: Service) -> None:
    with joined_session(service) as session:
        session.add(Order(name="a"))
        service.publish("a")
        session.flush()
        with suppress(IntegrityError), session.begin_nested():
            session.add(Order(name="a"))
            service.publish("b")
        service.publish("c")
        session.commit()

    assert (service.orders, service.sent) == ("a", "ac")


def test_rows_from_before_a_rolled_back_savepoint_are_handed_off(service: Service) -> None:
    with joined_connection(service) as connection:
        service.publish("a")
        savepoint = connection.begin_nested()
        service.publish("b")
        with connection.begin_nested():
            pass
        savepoint.rollback()
        service.publish("c")
        connection.commit()

    assert service.sent == "ac"
    assert {"a", "c"} <= set(service.handed_off)


# ── a session on somebody's connection ──────────────────────────────────────────────────────


MODES = pytest.mark.parametrize(
    "mode", ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]
)


@MODES
def test_a_session_in_a_connections_transaction_waits_for_its_commit(
    service: Service, mode: Any
) -> None:
    with service.engine.connect() as connection, connection.begin() as transaction:
        with (
            Session(connection, join_transaction_mode=mode) as session,
            joining.scope(session, service.store),
        ):
            service.publish("a")
            session.commit()
        if transaction.is_active:
            order(connection, "b")
            handed_off = list(service.handed_off)
            transaction.commit()
            assert handed_off == []

    assert (service.sent, service.handed_off) == ("a", ["a"])


@pytest.mark.parametrize("mode", ["conditional_savepoint", "rollback_only", "create_savepoint"])
def test_a_session_in_a_connections_transaction_is_rolled_back_with_it(
    service: Service, mode: Any
) -> None:
    with service.engine.connect() as connection, connection.begin() as transaction:
        with (
            Session(connection, join_transaction_mode=mode) as session,
            joining.scope(session, service.store),
        ):
            service.publish("a")
            session.commit()
        transaction.rollback()

    assert (service.sent, service.handed_off) == ("", [])


def test_a_savepoint_around_a_session_undoes_what_the_session_committed(service: Service) -> None:
    with service.engine.begin() as connection:
        savepoint = connection.begin_nested()
        with Session(connection) as session, joining.scope(session, service.store):
            service.publish("a")
            session.commit()
        savepoint.rollback()
        with Session(connection) as session, joining.scope(session, service.store):
            service.publish("b")
            session.commit()

    assert service.sent == "b"


@pytest.mark.parametrize("nested", [True, False])
def test_a_session_on_a_joined_connection_sets_its_savepoint_before_anything_is_published(
    service: Service, nested: bool
) -> None:
    with service.engine.begin() as connection, joining.scope(connection, service.store):
        service.publish("a")
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            with suppress(KeyError), session.begin(nested=nested):
                service.publish("b")
                raise KeyError
            with session.begin(nested=nested):
                service.publish("c")
            session.commit()

    assert service.sent == "ac"


# ── publishing while a commit is under way ──────────────────────────────────────────────────


def publish_on(target: Any, name: str, service: Service) -> None:
    """Publish once, when the event *name* of *target* comes."""

    def listener(*_: Any) -> None:
        service.publish(name[-1])

    event.listen(target, name, listener, once=True)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["before_commit", "before_flush", "after_flush"])
def test_a_message_published_during_the_commit_is_sent(
    service: Service, name: str, before: bool
) -> None:
    with joined_session(service) as session:
        if before:
            service.publish("a")
        session.add(Order(name="x"))
        publish_on(session, name, service)
        session.commit()

    assert service.sent == ("a" if before else "") + name[-1]
    assert service.stored_apart == []


def test_a_message_published_before_a_commit_without_work_is_sent(service: Service) -> None:
    with joined_session(service) as session:
        publish_on(session, "before_commit", service)
        session.commit()

    assert service.sent == "t"


def test_a_message_published_as_a_row_is_inserted_is_sent(service: Service) -> None:
    def publish(mapper: Any, connection: Any, target: Order) -> None:
        service.publish(target.name)

    event.listen(Order, "after_insert", publish)
    try:
        with joined_session(service) as session:
            session.add(Order(name="a"))
            session.commit()
    finally:
        event.remove(Order, "after_insert", publish)

    assert service.sent == "a"


def test_a_message_published_in_the_final_flush_of_a_block_with_a_savepoint_open_is_sent(
    service: Service,
) -> None:
    with joined_session(service) as session, session.begin():
        session.begin_nested()
        session.add(Order(name="x"))
        publish_on(session, "after_flush", service)

    assert service.sent == "h"


def test_a_message_that_no_commit_could_take_along_is_stored_apart(service: Service) -> None:
    with joined_session(service) as session, session.begin():
        session.begin_nested()
        event.listen(session, "after_commit", lambda _: session.add(Order(name="x")), once=True)
        publish_on(session, "after_flush", service)

    assert (service.sent, service.stored_apart) == ("h", ["h"])


@pytest.mark.parametrize("target", ["connection", "engine", "every engine"])
def test_a_message_published_as_the_connection_commits_is_sent(
    service: Service, target: str
) -> None:
    def publish(_: Connection) -> None:
        service.publish("b")

    with joined_connection(service) as connection:
        listening = {"connection": connection, "engine": service.engine, "every engine": Engine}
        order(connection, "x")
        service.publish("a")
        event.listen(listening[target], "commit", publish)
        connection.commit()
        event.remove(listening[target], "commit", publish)
        service.publish("c")
        connection.rollback()

    assert service.sent == "ab"


def test_a_message_published_after_the_commit_is_outside(service: Service) -> None:
    with joined_session(service) as session:
        service.publish("a")
        publish_on(session, "after_commit", service)
        session.commit()
        service.publish("b")
        session.commit()

    assert (service.sent, service.outside) == ("ab", ["t"])


# ── failures ────────────────────────────────────────────────────────────────────────────────


def test_a_flush_error_in_the_commit_drops_the_messages_and_the_next_are_sent(
    service: Service,
) -> None:
    with joined_session(service) as session:
        session.add_all([Order(name="a"), Order(name="a")])
        service.publish("a")
        with pytest.raises(IntegrityError):
            session.commit()
        service.publish("b")
        session.rollback()
        service.publish("c")
        session.commit()

    assert (service.orders, service.sent) == ("", "c")


@both
def test_a_commit_that_fails_hands_nothing_off(service: Service, opening: Opening) -> None:
    """A deferred constraint fails at the COMMIT itself."""
    if service.database.vendor == "mariadb":
        pytest.skip("MariaDB has no deferred constraints")
    with service.engine.begin() as connection:
        connection.execute(
            text(
                "CREATE TABLE lines (order_id integer "
                "REFERENCES orders (id) DEFERRABLE INITIALLY DEFERRED)"
            )
        )
    with opening(service) as target:
        if service.database.vendor == "sqlite":
            target.execute(text("PRAGMA foreign_keys = ON"))
        target.execute(text("INSERT INTO lines VALUES (-1)"))
        service.publish("a")
        with pytest.raises(IntegrityError):
            target.commit()
        target.rollback()
    with opening(service) as target:
        service.publish("b")
        target.commit()
    with service.engine.begin() as connection:
        connection.execute(text("DROP TABLE lines"))

    assert (service.sent, service.handed_off) == ("b", ["b"])


@both
def test_work_is_not_committed_without_its_messages(service: Service, opening: Opening) -> None:
    def fail(connection: Connection, messages: Sequence[Message]) -> list[int]:
        raise OSError("the disk is full")

    store, service.store = service.store, replace(service.store, add=fail)
    with opening(service) as target:
        order(target, "a")
        service.publish("a")
        with pytest.raises(OSError, match="full"):
            target.commit()
        with pytest.raises(InvalidRequestError):
            target.commit()
        target.rollback()
        order(target, "b")
        target.commit()
    service.store = store

    assert (service.orders, service.sent) == ("b", "")


def test_a_swallowed_error_that_broke_the_transaction_fails_the_commit(service: Service) -> None:
    if service.database.vendor != "postgresql":
        pytest.skip("only PostgreSQL gives up a transaction for one failed statement")
    with joined_session(service) as session:
        order(session, "a")
        service.publish("a")
        with suppress(DBAPIError):
            session.execute(text("SELECT 1 / 0"))
        with pytest.raises(DBAPIError):
            session.commit()

    assert (service.orders, service.sent) == ("", "")


@both
def test_autocommit_is_refused(service: Service, opening: Opening) -> None:
    service.engine = service.engine.execution_options(isolation_level="AUTOCOMMIT")

    def publish_and_commit() -> None:
        with opening(service) as target:
            service.publish("a")
            target.commit()

    with pytest.raises(AutocommitTransaction):
        publish_and_commit()
    assert service.sent == ""


def test_autocommit_of_a_whole_engine_is_refused(service: Service) -> None:
    engine = create_engine(service.engine.url, isolation_level="AUTOCOMMIT")
    with (
        engine.connect() as connection,
        joining.scope(connection, service.store),
        pytest.raises(AutocommitTransaction),
    ):
        service.publish("a")
    engine.dispose()


def test_an_engine_that_begins_by_itself_is_no_autocommit(service: Service) -> None:
    if service.database.vendor != "sqlite":
        pytest.skip("the recipe is one for SQLite")
    engine = create_engine(service.engine.url)

    @event.listens_for(engine, "connect")
    def leave_beginning_to_us(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    with Session(engine) as session, joining.scope(session, service.store):
        service.publish("a")
        session.commit()
    with engine.connect() as connection, joining.scope(connection, service.store):
        service.publish("b")
        connection.commit()
    engine.dispose()

    assert service.sent == "ab"


# ── more than one engine ────────────────────────────────────────────────────────────────────


@pytest.fixture
def elsewhere() -> Iterator[Engine]:
    """Another database."""
    engine = create_engine("sqlite://")
    Order.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("joined_first", [True, False])
@pytest.mark.parametrize("flushed", [True, False])
def test_work_on_another_engine_is_refused_before_anything_commits(
    service: Service, elsewhere: Engine, joined_first: bool, flushed: bool
) -> None:
    with Session(service.engine, binds={Order: elsewhere}) as session:
        if not joined_first:
            session.execute(insert(Order).values(name="a"))
        with joining.scope(session, service.store):
            session.add(Order(name="b"))
            if flushed:
                session.flush()
            service.publish("a")
            with pytest.raises(TwoEngines):
                session.commit()
    with elsewhere.connect() as connection:
        rows = connection.execute(text("SELECT count(*) FROM orders")).scalar()

    assert (rows, service.sent) == (0, "")


def test_a_session_that_cannot_tell_its_engine_is_told(service: Service) -> None:
    with (
        Session(binds={Order: service.engine}) as session,
        joining.scope(session, service.store, bind=service.engine),
    ):
        session.add(Order(name="a"))
        service.publish("a")
        session.commit()

    assert (service.orders, service.sent) == ("a", "a")


@pytest.fixture
def twophase(service: Service) -> Service:
    if service.database.vendor == "sqlite":
        pytest.skip("SQLite has no two-phase commit")
    with service.engine.connect() as connection:
        if service.database.vendor == "postgresql" and not int(
            connection.scalar(text("SHOW max_prepared_transactions"))
        ):
            pytest.skip("this PostgreSQL allows no prepared transactions")
    return service


@pytest.mark.parametrize("ending", ["commit", "prepare, commit", "prepare, rollback"])
def test_a_message_follows_a_two_phase_transaction(twophase: Service, ending: str) -> None:
    with (
        Session(twophase.engine, twophase=True) as session,
        joining.scope(session, twophase.store),
    ):
        session.add(Order(name="a"))
        twophase.publish("a")
        for step in ending.split(", "):
            getattr(session, step)()

    assert twophase.sent == ("" if "rollback" in ending else "a")


def test_a_message_follows_a_connections_two_phase_transaction(twophase: Service) -> None:
    with twophase.engine.connect() as connection, joining.scope(connection, twophase.store):
        for name, ending in (("a", "commit"), ("b", "rollback")):
            transaction = connection.begin_twophase()
            twophase.publish(name)
            transaction.prepare()
            getattr(transaction, ending)()

    assert twophase.sent == "a"


# ── which transaction ───────────────────────────────────────────────────────────────────────


def test_nested_blocks_of_two_sessions_follow_their_own_transactions(service: Service) -> None:
    with joined_session(service) as outer:
        service.publish("a")
        with joined_session(service) as inner:
            service.publish("b")
            inner.rollback()
        service.publish("c")
        outer.commit()

    assert service.sent == "ac"


def test_a_scoped_session_is_resolved_at_entry(service: Service) -> None:
    registry = scoped_session(sessionmaker(service.engine))
    with joining.scope(registry, service.store):
        service.publish("a")
        registry.commit()
    registry.remove()

    assert service.sent == "a"


def test_anything_else_is_refused(service: Service) -> None:
    with pytest.raises(TypeError, match="neither a session"):
        joining.scope(service.engine, service.store)


def test_joining_twice_is_joining_once(service: Service) -> None:
    with Session(service.engine) as session:
        first = joining.join(session, service.store)

        assert joining.join(session, service.store) is first


def test_a_thread_is_outside(service: Service) -> None:
    with joined_session(service) as session:
        thread = threading.Thread(target=service.publish, args=["a"])
        thread.start()
        thread.join()
        session.commit()

    assert (service.sent, service.outside) == ("", ["a"])


def test_a_long_held_connection_hands_off_with_its_next_transaction(service: Service) -> None:
    with service.engine.connect() as connection:
        with joining.scope(connection, service.store):
            service.publish("a")
        connection.commit()
        before = list(service.handed_off)
        order(connection, "x")
        after = list(service.handed_off)

    assert (before, after) == ([], ["a"])


def test_a_block_hands_off_when_the_transaction_ended_in_it(service: Service) -> None:
    with service.engine.connect() as connection:
        with joining.scope(connection, service.store):
            service.publish("a")
            connection.commit()

        assert service.handed_off == ["a"]


def test_a_block_hands_nothing_off_that_is_not_committed_yet(service: Service) -> None:
    with service.engine.connect() as connection:
        with joining.scope(connection, service.store):
            service.publish("a")
            with connection.begin_nested():
                pass
        before = list(service.handed_off)
        connection.commit()

    assert (before, service.handed_off) == ([], ["a"])


def test_nothing_is_handed_off_after_a_rollback(service: Service) -> None:
    with joined_connection(service) as connection:
        service.publish("a")
        with connection.begin_nested():
            pass
        connection.rollback()

    assert (service.sent, service.handed_off) == ("", [])


def test_nothing_is_left_behind_on_pooled_connections(service: Service) -> None:
    infos: list[dict[Any, Any]] = []

    def note(_: Any, record: Any) -> None:
        infos.append(dict(record.info))

    with joined_session(service) as session:
        service.publish("a")
        session.commit()
    event.listen(Pool, "checkout", lambda dbapi, record, fairy: note(dbapi, record), once=True)
    with service.engine.connect():
        pass

    (info,) = infos
    assert set(info) <= {"celery_eda_left_at"}


# ── asyncio ─────────────────────────────────────────────────────────────────────────────────


AsyncOpening = Callable[[AsyncEngine, Store], AbstractAsyncContextManager[Any]]


@asynccontextmanager
async def joined_async_session(engine: AsyncEngine, store: Store) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine) as session, joining.scope(session, store):
        yield session


@asynccontextmanager
async def joined_async_connection(
    engine: AsyncEngine, store: Store
) -> AsyncIterator[AsyncConnection]:
    async with engine.connect() as connection, joining.scope(connection, store):
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
        async with engine.begin() as connection, joining.scope(connection, async_service.store):
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
        with joining.scope(registry, async_service.store):
            async_service.publish("a")
        await registry.commit()
        await registry.remove()

    async_service.run(body)

    assert async_service.sent == "a"


def test_greenlet_is_only_needed_for_asyncio() -> None:
    program = "import sys; sys.modules['greenlet'] = None; import celery_eda"

    subprocess.run([sys.executable, "-c", program], check=True)
