"""Messages whose transaction fails, belongs to another engine, or is one of several."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import (
    suppress,
)
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import Pool

from celery_eda.core.message import Message
from celery_eda.errors import AutocommitTransaction, TwoEngines
from celery_eda.outbox.transactions import join
from tests.outbox.test_join import Opening, both, joined_connection, joined_session, order
from tests.support.service import Order, Service

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

    store, service.store = (
        service.store,
        replace(service.store, writer=replace(service.store.writer, write=fail)),
    )
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
        join.scope(connection, service.store),
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

    with Session(engine) as session, join.scope(session, service.store):
        service.publish("a")
        session.commit()
    with engine.connect() as connection, join.scope(connection, service.store):
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
        with join.scope(session, service.store):
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
        join.scope(session, service.store, bind=service.engine),
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
        join.scope(session, twophase.store),
    ):
        session.add(Order(name="a"))
        twophase.publish("a")
        for step in ending.split(", "):
            getattr(session, step)()

    assert twophase.sent == ("" if "rollback" in ending else "a")


def test_a_message_follows_a_connections_two_phase_transaction(twophase: Service) -> None:
    with twophase.engine.connect() as connection, join.scope(connection, twophase.store):
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
    with join.scope(registry, service.store):
        service.publish("a")
        registry.commit()
    registry.remove()

    assert service.sent == "a"


def test_anything_else_is_refused(service: Service) -> None:
    with pytest.raises(TypeError, match="neither a session"):
        join.scope(service.engine, service.store)


def test_joining_twice_is_joining_once(service: Service) -> None:
    with Session(service.engine) as session:
        first = join.join(session, service.store)

        assert join.join(session, service.store) is first


def test_a_thread_is_outside(service: Service) -> None:
    with joined_session(service) as session:
        thread = threading.Thread(target=service.publish, args=["a"])
        thread.start()
        thread.join()
        session.commit()

    assert (service.sent, service.outside) == ("", ["a"])


def test_a_long_held_connection_hands_off_with_its_next_transaction(service: Service) -> None:
    with service.engine.connect() as connection:
        with join.scope(connection, service.store):
            service.publish("a")
        connection.commit()
        before = list(service.handed_off)
        order(connection, "x")
        after = list(service.handed_off)

    assert (before, after) == ([], ["a"])


def test_a_block_hands_off_when_the_transaction_ended_in_it(service: Service) -> None:
    with service.engine.connect() as connection:
        with join.scope(connection, service.store):
            service.publish("a")
            connection.commit()

        assert service.handed_off == ["a"]


def test_a_block_hands_nothing_off_that_is_not_committed_yet(service: Service) -> None:
    with service.engine.connect() as connection:
        with join.scope(connection, service.store):
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
