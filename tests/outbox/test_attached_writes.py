"""Finding out if a session has written, and which of several sessions a message belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.sql import Delete, Insert, Update

from celery_eda.errors import TwoSessions
from celery_eda.outbox.transactions import attach, join, writes
from tests.support.service import Order, Service


class Mishap(Exception):
    """Something that existing code does not expect."""


@pytest.fixture
def sessions(service: Service) -> sessionmaker[Session]:
    """The service's sessionmaker, attached."""
    factory = sessionmaker(service.engine)
    attach.attach(factory, service.store)
    return factory


# ── words ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("statement", "reads"),
    [
        ("(SELECT 1) UNION (SELECT 2)", True),
        ("TABLE orders", True),
        ("VALUES (1)", True),
        ("LOCK TABLE orders IN SHARE MODE", True),
        ("WITH one AS (SELECT 1) SELECT * FROM one, orders FOR UPDATE OF orders", True),
        ("WITH one AS (SELECT 1) SELECT * FROM orders FOR NO KEY UPDATE", True),
        ('WITH one AS (SELECT 1 AS "update") SELECT * FROM one', True),
        ("WITH one AS (SELECT 'delete' AS word) SELECT * FROM one /* insert */", True),
        ("EXPLAIN SELECT 1", True),
        ("WITH gone AS (DELETE FROM orders RETURNING *) SELECT * FROM gone", False),
        ("EXPLAIN ANALYZE INSERT INTO orders VALUES (1)", False),
        ("MERGE INTO orders USING one ON true WHEN MATCHED THEN DELETE", False),
        ("CALL book(1)", False),
        ("CREATE TABLE lines (n int)", False),
        ("DO $$ BEGIN END $$", False),
    ],
)
def test_a_statement_is_judged_by_its_words(statement: str, reads: bool) -> None:
    assert writes.only_reads(statement) is reads


# ── the database ────────────────────────────────────────────────────────────────────────────


def by_raw_cursor(session: Session) -> None:
    cursor = session.connection().connection.cursor()
    cursor.execute("INSERT INTO orders VALUES (-1, 'raw')")
    cursor.close()


def by_function(session: Session) -> None:
    session.execute(text("SELECT book()"))


def by_copy(session: Session) -> None:
    cursor: Any = session.connection().connection.cursor()
    with cursor.copy("COPY orders FROM STDIN") as rows:
        rows.write("-1\tcopied\n")


def by_select_into(session: Session) -> None:
    session.execute(text("SELECT * INTO copied FROM orders"))


@pytest.fixture
def booking(service: Service) -> Iterator[None]:
    """A function that writes, where functions can."""
    if service.database.vendor != "postgresql":
        yield
        return
    body = "INSERT INTO orders VALUES (-1, 'booked') RETURNING id"
    with service.engine.begin() as connection:
        connection.execute(
            text(f"CREATE OR REPLACE FUNCTION book() RETURNS int LANGUAGE sql AS $${body}$$")
        )
    yield
    with service.engine.begin() as connection:
        connection.execute(text("DROP FUNCTION book()"))


@pytest.mark.parametrize("ending", ["rollback", "close", "exception", "block"])
@pytest.mark.parametrize("work", [by_raw_cursor, by_function, by_copy, by_select_into])
def test_work_that_no_word_tells_of_decides_the_fate_of_messages(
    service: Service,
    sessions: sessionmaker[Session],
    booking: None,
    work: Callable[[Session], None],
    ending: str,
) -> None:
    if service.database.vendor == "sqlite" and work is not by_raw_cursor:
        pytest.skip("SQLite has neither functions that write nor COPY")
    with suppress(Mishap), sessions() as session:
        session.commit()
        if ending == "block":
            with session.begin():
                work(session)
                service.publish("a")
                raise Mishap
        work(session)
        service.publish("a")
        if ending == "rollback":
            session.rollback()
        if ending == "exception":
            raise Mishap

    assert (service.orders, service.sent) == ("", "")


@pytest.mark.parametrize(
    "statement",
    ["TABLE orders", "SELECT * FROM orders FOR UPDATE", "(SELECT 1) UNION (SELECT 2)"],
)
def test_locks_and_queries_of_any_form_leave_no_fate_to_share(
    service: Service, sessions: sessionmaker[Session], statement: str
) -> None:
    if service.database.vendor == "sqlite":
        pytest.skip("SQLite does not know these statements")
    with sessions() as session:
        session.execute(text(statement))
        service.publish("a")

    assert service.stored_apart == ["a"]


def test_a_failed_query_leaves_no_fate_to_share(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with suppress(Exception), sessions() as session:
        session.commit()
        session.execute(text("SELECT 1"))
        service.publish("a")
        session.execute(text("SELECT * FROM nowhere"))

    assert service.sent == "a"


# ── several sessions ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_a_message_belongs_to_the_session_that_has_written(
    service: Service, sessions: sessionmaker[Session], order: str
) -> None:
    with sessions() as one, sessions() as other:
        reader, writer = (one, other) if order == "inside" else (other, one)
        reader.scalars(select(Order)).all()
        writer.add(Order(name="a"))
        service.publish("a")
        writer.rollback()
        writer.execute(insert(Order).values(name="b"))
        service.publish("b")
        writer.commit()
        service.publish("c")

    assert (service.orders, service.sent) == ("b", "bc")


def test_two_sessions_that_have_written_have_to_be_told_apart(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with sessions() as one, sessions() as other:
        for session in (one, other):
            session.add(Order(name="a"))
        with pytest.raises(TwoSessions, match="Say which"):
            service.publish("a")


def test_a_session_between_two_transactions_is_in_no_ones_way(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with sessions() as idle, sessions() as session:
        idle.commit()
        session.scalars(select(Order)).all()
        service.publish("a")
        session.rollback()
        service.publish("b")

    assert service.sent == "b"


# ── a session that lives long ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_between_two_transactions_a_message_is_stored_at_once(
    service: Service, sessions: sessionmaker[Session], ending: str
) -> None:
    session = sessions()
    session.add(Order(name="a"))
    getattr(session, ending)()
    service.publish("a")
    at_once = service.sent
    session.close()

    assert (at_once, service.sent) == ("a", "a")


def test_pending_changes_begin_the_next_transaction(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with suppress(Mishap), sessions() as session:
        session.commit()
        session.add(Order(name="a"))
        service.publish("a")
        raise Mishap

    assert service.sent == ""


# ── several engines ─────────────────────────────────────────────────────────────────────────


class Base(DeclarativeBase):
    """Mapped apart from the service's own classes."""


class Line(Base):
    """A row of the same table as ``Order``."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@pytest.fixture
def replica(service: Service) -> Iterator[Engine]:
    """An engine for reading, as if it led to a replica."""
    engine = create_engine(service.engine.url)
    yield engine
    engine.dispose()


def routing(writer: Engine, reader: Engine) -> type[Session]:
    class Routing(Session):
        def get_bind(self, mapper: Any = None, clause: Any = None, **options: Any) -> Any:
            if self._flushing or isinstance(clause, Insert | Update | Delete):
                return writer
            return reader

    return Routing


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("attached", [True, False])
def test_a_session_may_read_from_a_replica(
    service: Service, replica: Engine, attached: bool, reads: bool
) -> None:
    factory = sessionmaker(class_=routing(service.engine, replica))
    if attached:
        attach.attach(factory, service.store)
    with factory() as session, join.scope(session, service.store):
        if reads:
            session.scalars(select(Line)).all()
        session.add(Line(id=-1, name="a"))
        service.publish("a")
        session.commit()

    assert (service.orders, service.sent) == ("a", "a")


@pytest.mark.parametrize("flushed", [True, False])
def test_a_session_without_a_default_engine_uses_that_of_its_work(
    service: Service, flushed: bool
) -> None:
    with Session(binds={Base: service.engine}) as session, join.scope(session, service.store):
        session.add(Line(id=-1, name="a"))
        if flushed:
            session.flush()
        service.publish("a")
        session.commit()

    assert (service.orders, service.sent) == ("a", "a")


def test_a_session_without_engine_and_work_stores_its_messages(service: Service) -> None:
    with Session(binds={Base: service.engine}) as session, join.scope(session, service.store):
        service.publish("a")
        session.commit()

    assert (service.sent, service.stored_apart) == ("a", ["a"])
