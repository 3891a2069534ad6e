"""Messages share the fate of the Session's or Connection's transaction they were published in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    suppress,
)
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, insert
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import Session

from celery_eda.outbox.transactions import join
from tests.support.service import Order, Service

Opening = Callable[[Service], AbstractContextManager[Any]]


@contextmanager
def joined_session(service: Service) -> Iterator[Session]:
    with Session(service.engine) as session, join.scope(session, service.store):
        yield session


@contextmanager
def joined_connection(service: Service) -> Iterator[Connection]:
    with service.engine.connect() as connection, join.scope(connection, service.store):
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
    with service.engine.begin() as connection, join.scope(connection, service.store):
        service.publish("a")
    with Session(service.engine) as session, session.begin():
        with join.scope(session, service.store):
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
            join.scope(session, service.store),
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
            join.scope(session, service.store),
        ):
            service.publish("a")
            session.commit()
        transaction.rollback()

    assert (service.sent, service.handed_off) == ("", [])


def test_a_savepoint_around_a_session_undoes_what_the_session_committed(service: Service) -> None:
    with service.engine.begin() as connection:
        savepoint = connection.begin_nested()
        with Session(connection) as session, join.scope(session, service.store):
            service.publish("a")
            session.commit()
        savepoint.rollback()
        with Session(connection) as session, join.scope(session, service.store):
            service.publish("b")
            session.commit()

    assert service.sent == "b"


@pytest.mark.parametrize("nested", [True, False])
def test_a_session_on_a_joined_connection_sets_its_savepoint_before_anything_is_published(
    service: Service, nested: bool
) -> None:
    with service.engine.begin() as connection, join.scope(connection, service.store):
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
