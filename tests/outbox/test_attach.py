"""Existing code that uses an attached session factory sends what it would expect to send."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from celery.app.task import Context
from sqlalchemy import Engine, RootTransaction, create_engine, event, func, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_eda.core import context
from celery_eda.core.delivery import Delivery
from celery_eda.errors import TwoSessions
from celery_eda.outbox.transactions import attach, join
from tests.support.messages import message
from tests.support.service import Order, Service


@pytest.fixture
def sessions(service: Service) -> sessionmaker[Session]:
    """The service's session factory, attached."""
    factory = sessionmaker(service.engine)
    attach.attach(factory, service.store)
    return factory


class Mishap(Exception):
    """Something that existing code does not expect."""


LISTENING = """
from celery_eda import EDA
from celery_eda.outbox.transactions import attach as attachment
from celery_eda.outbox.transactions import connection as joined_connection
from celery_eda.outbox.transactions import session as joined_session
from celery_eda.outbox.transactions import writes
from celery import Celery
from sqlalchemy import Engine, event
from sqlalchemy.orm import Session, sessionmaker

def listening():
    of_transactions = [
        *((target, name, each) for target, name, each in joined_connection.LISTENERS),
        *((Session, name, each) for name, each, _ in joined_session.LISTENERS),
    ]
    of_statements = (Engine, "before_cursor_execute", writes.on_before_cursor_execute)
    return [sum(event.contains(*each) for each in of_transactions), event.contains(*of_statements)]

imported = listening()
eda = EDA(Celery("shop", set_as_current=False))
made = listening()
attachment.attach(sessionmaker(), None)
print(imported, made, listening())
"""


def test_importing_installs_no_listener_and_only_an_attached_factory_one_of_statements() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LISTENING], capture_output=True, text=True, check=True
    )

    assert ran.stdout.strip() == "[0, False] [18, False] [18, True]"


# ── thirteen everyday idioms ────────────────────────────────────────────────────────────────
# Each is told whether a write, a commit and a publish by what it does to the session.


def commit_then_publish_an_attribute(session: Session, publish: Callable[[], None]) -> None:
    order = Order(name="new")
    session.add(order)
    session.commit()
    assert order.id  # expired, so this begins a transaction
    publish()


def commit_then_publish(session: Session, publish: Callable[[], None]) -> None:
    session.add(Order(name="new"))
    session.commit()
    publish()


def commit_publish_fail_roll_back(session: Session, publish: Callable[[], None]) -> None:
    order = Order(name="new")
    session.add(order)
    session.commit()
    try:
        assert order.id
        publish()
        raise Mishap
    except Mishap:
        session.rollback()


def only_read_and_publish(session: Session, publish: Callable[[], None]) -> None:
    session.scalars(select(Order)).all()
    publish()


def publish_write_commit(session: Session, publish: Callable[[], None]) -> None:
    publish()
    session.add(Order(name="new"))
    session.commit()


def flush_publish_roll_back(session: Session, publish: Callable[[], None]) -> None:
    session.add(Order(name="new"))
    session.flush()
    publish()
    session.rollback()


def add_publish_fail(session: Session, publish: Callable[[], None]) -> None:
    session.add(Order(name="new"))
    publish()
    raise Mishap


def insert_publish_close(session: Session, publish: Callable[[], None]) -> None:
    session.execute(insert(Order).values(name="new"))
    publish()
    session.close()


def publish_roll_back(session: Session, publish: Callable[[], None]) -> None:
    publish()
    session.rollback()


def publish_read_fail(session: Session, publish: Callable[[], None]) -> None:
    publish()
    session.scalars(select(Order)).all()
    raise Mishap


def commit_publish_write_fail_to_commit(session: Session, publish: Callable[[], None]) -> None:
    session.add(Order(name="new"))
    session.commit()
    publish()
    session.add(Order(name="new"))
    session.commit()


def commit_publish_add_roll_back(session: Session, publish: Callable[[], None]) -> None:
    session.add(Order(name="new"))
    session.commit()
    publish()
    session.add(Order(name="newer"))
    session.rollback()


def commit_publish_write_commit(session: Session, publish: Callable[[], None]) -> None:
    session.add(Order(name="new"))
    session.commit()
    publish()
    session.add(Order(name="newer"))
    session.commit()


# Those that publish after a commit, before the session is used again, publish at once.
AT_ONCE = [
    commit_then_publish,
    commit_publish_write_fail_to_commit,
    commit_publish_add_roll_back,
    commit_publish_write_commit,
]
IDIOMS = [
    (commit_then_publish_an_attribute, True),
    (commit_then_publish, True),
    (commit_publish_fail_roll_back, True),
    (only_read_and_publish, True),
    (publish_write_commit, True),
    (flush_publish_roll_back, False),
    (add_publish_fail, False),
    (insert_publish_close, False),
    (publish_roll_back, False),
    (publish_read_fail, False),
    (commit_publish_write_fail_to_commit, True),
    (commit_publish_add_roll_back, True),
    (commit_publish_write_commit, True),
]


@pytest.mark.parametrize(("idiom", "sends"), IDIOMS, ids=[each.__name__ for each, _ in IDIOMS])
def test_everyday_code_sends_what_it_means_to_send(
    service: Service,
    sessions: sessionmaker[Session],
    idiom: Callable[[Session, Callable[[], None]], None],
    sends: bool,
) -> None:
    at_once: list[str] = []

    def publish() -> None:
        service.publish("a")
        at_once.append(service.sent)

    with suppress(Mishap, IntegrityError), sessions() as session:
        idiom(session, publish)

    assert service.outside == []
    assert at_once == ["a" if idiom in AT_ONCE else ""]
    assert service.sent == service.handed_off_in_order == ("a" if sends else "")


# ── what counts as a write ──────────────────────────────────────────────────────────────────


def test_an_insert_that_was_tried_and_failed_counts_as_a_write(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with sessions() as session:
        session.add(Order(name="a"))
        session.commit()
        session.scalars(select(Order)).all()
        service.publish("a")
        with suppress(IntegrityError):
            session.execute(insert(Order).values(name="a"))
        session.rollback()

    assert service.sent == ""


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT count(*) FROM orders",
        "-- a comment\n/* and\nanother */ select 1",
        "WITH old AS (SELECT 1) SELECT * FROM old",
    ],
)
def test_a_statement_that_only_reads_leaves_no_fate_to_share(
    service: Service, sessions: sessionmaker[Session], statement: str
) -> None:
    with sessions() as session:
        service.publish("a")
        session.execute(text(statement))

    assert service.stored_apart == ["a"]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE orders SET name = name",
        "DELETE FROM orders",
        "/* x */ INSERT INTO orders VALUES (-7, 'x')",
    ],
)
def test_a_writing_text_decides_the_fate_of_what_was_published(
    service: Service,
    sessions: sessionmaker[Session],
    statement: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with sessions() as session:
        service.publish("a")
        session.connection().execute(text(statement))

    assert service.sent == ""
    assert "not sent: a" in caplog.text


def test_a_savepoint_alone_is_no_write(service: Service, sessions: sessionmaker[Session]) -> None:
    with sessions() as session, session.begin_nested():
        session.scalars(select(Order)).all()
        service.publish("a")

    assert service.sent == "a"


def test_a_write_of_an_earlier_transaction_does_not_count(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with sessions() as session:
        session.add(Order(name="a"))
        session.flush()
        session.rollback()
        service.publish("a")
        session.scalars(select(Order)).all()

    assert service.sent == "a"


# ── endings ─────────────────────────────────────────────────────────────────────────────────


def test_the_block_of_a_factory_commits_or_drops(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with sessions.begin():
        service.publish("a")
    with suppress(Mishap), sessions.begin():
        service.publish("b")
        raise Mishap

    assert service.sent == "a"


def test_existing_code_may_begin_after_it_has_published(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with sessions() as session:
        service.publish("a")
        with session.begin():
            service.publish("b")

    assert service.sent == "ab"


def test_a_commit_of_nothing_else_sends(service: Service, sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        service.publish("a")
        session.commit()

        assert (service.sent, service.stored_apart) == ("a", [])


def test_what_is_published_in_a_savepoint_vanishes_with_it(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with sessions.begin() as session:
        service.publish("a")
        with suppress(Mishap), session.begin_nested():
            service.publish("b")
            raise Mishap
        with session.begin_nested():
            service.publish("c")

    assert service.sent == "ac"


def test_an_exception_is_seen_by_a_session_that_is_closed_without_a_with(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    def work() -> None:
        session = sessions()
        try:
            service.publish("a")
            raise Mishap
        finally:
            session.close()

    with suppress(Mishap):
        work()

    assert service.sent == ""


def test_an_exception_from_before_does_not_fail_a_session(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    try:
        raise Mishap
    except Mishap:
        with sessions():
            service.publish("a")

    assert service.sent == "a"


@pytest.mark.parametrize("ending", ["close", "reset", "invalidate"])
def test_however_a_session_is_closed_it_captures_no_more(
    service: Service, sessions: sessionmaker[Session], ending: str
) -> None:
    session = sessions()
    service.publish("a")
    getattr(session, ending)()
    service.publish("b")

    assert (service.sent, service.outside) == ("a", ["b"])


def test_a_closed_session_that_is_used_again_captures_again(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    session = sessions()
    session.close()
    session.add(Order(name="a"))
    service.publish("a")
    session.commit()
    session.close()

    assert (service.sent, service.outside) == ("a", [])


def test_a_session_used_again_has_never_committed(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    session = sessions()
    session.commit()
    session.close()
    session.scalars(select(Order)).all()
    service.publish("a")
    session.rollback()
    session.close()

    assert service.sent == ""


@pytest.mark.parametrize("wrote", [True, False])
def test_a_forgotten_session_is_settled_as_a_closed_one(
    service: Service,
    sessions: sessionmaker[Session],
    wrote: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    session = sessions()
    session.execute(insert(Order).values(name="a") if wrote else select(Order))
    service.publish("a")
    del session
    gc.collect()
    service.publish("b")

    assert (service.sent, service.outside) == ("" if wrote else "a", ["b"])
    assert ("not sent: a" in caplog.text) is wrote


def test_a_message_published_after_the_commit_event_is_outside(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    event.listen(sessions, "after_commit", lambda _: service.publish("b"), once=True)
    with sessions() as session:
        service.publish("a")
        session.commit()

    assert (service.sent, service.outside) == ("a", ["b"])


# ── which sessions ──────────────────────────────────────────────────────────────────────────


def test_two_open_sessions_have_to_be_told_apart(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with sessions() as one, sessions():
        with pytest.raises(TwoSessions, match="Say which"):
            service.publish("a")
        with join.scope(one, service.store):
            service.publish("b")
        one.commit()

    assert service.sent == "b"


def test_a_session_after_a_closed_one_is_the_only_one(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    for name in "ab":
        with sessions() as session:
            service.publish(name)
            session.commit()

    assert service.sent == "ab"


def test_a_scoped_session_captures_from_its_first_use(service: Service) -> None:
    registry = scoped_session(sessionmaker(service.engine))
    attach.attach(registry, service.store)
    service.publish("a")
    registry.add(Order(name="x"))
    service.publish("b")
    registry.commit()
    service.publish("c")
    registry.remove()
    service.publish("d")

    assert (service.sent, service.outside) == ("bc", ["a", "d"])


@pytest.mark.parametrize("fails", [True, False])
def test_what_a_reading_session_published_shares_the_fate_of_its_connection(
    service: Service, sessions: sessionmaker[Session], fails: bool
) -> None:
    with suppress(Mishap), service.engine.begin() as connection:
        connection.execute(insert(Order).values(name="a"))
        with sessions(bind=connection) as session:
            session.scalars(select(Order)).all()
            service.publish("a")
        if fails:
            raise Mishap

    assert service.sent == service.orders == ("" if fails else "a")
    assert service.stored_apart == []


def test_a_factory_that_is_not_attached_is_left_alone(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with sessionmaker(service.engine)():
        service.publish("a")

    assert service.outside == ["a"]


def test_attaching_twice_is_attaching_once(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    attached = sessions.class_

    attach.attach(sessions, service.store)

    assert sessions.class_ is attached


def test_anything_else_cannot_be_attached(service: Service) -> None:
    with pytest.raises(TypeError, match="makes no sessions"):
        attach.attach(service.engine, service.store)


# ── while a message is handled ──────────────────────────────────────────────────────────────


@contextmanager
def delivery(service: Service) -> Iterator[context.InProgress]:
    """A message in progress, whose transaction commits unless its handler fails."""
    with service.engine.begin() as connection:
        begun = connection.get_transaction()
        assert isinstance(begun, RootTransaction)
        progress = context.InProgress(Delivery(None, Context(), message("x").identity), begun)
        token = context.in_progress.set(progress)
        transaction = join.join(connection, service.store)
        try:
            with context.scope_of(transaction, inherited=True):
                yield progress
            transaction.write(connection)
        finally:
            progress.finished = True
            context.in_progress.reset(token)


def test_a_session_takes_part_in_the_transaction_of_the_message_in_progress(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with delivery(service):
        with sessions() as session:
            session.add(Order(name="a"))
            service.publish("a")
            session.commit()
        with sessions() as session:
            session.add(Order(name="b"))
            service.publish("b")
            session.rollback()
        with suppress(Mishap), sessions.begin() as session:
            session.add(Order(name="c"))
            session.flush()
            service.publish("c")
            raise Mishap
        with sessions() as session:
            session.add(Order(name="d"))
            service.publish("d")
        service.publish("e")
        before = service.orders, service.sent

    assert before == ("", "")
    assert (service.orders, service.sent) == ("a", "ae")
    assert (service.stored_apart, sorted(service.handed_off)) == ([], ["a", "e"])


def test_what_a_session_committed_is_undone_with_the_message_in_progress(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with suppress(Mishap), delivery(service):
        with sessions() as session:
            session.add(Order(name="a"))
            service.publish("a")
            session.commit()
            session.scalars(select(Order)).all()
            service.publish("b")
        raise Mishap

    assert (service.orders, service.sent, service.stored_apart) == ("", "", [])


def test_what_only_a_reading_session_published_leaves_with_the_message_in_progress(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with delivery(service), sessions() as session:
        session.scalars(select(Order)).all()
        service.publish("a")

    assert (service.sent, service.stored_apart) == ("a", [])


def test_what_a_session_published_before_its_savepoint_vanishes_with_it(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with delivery(service), sessions() as session:
        with suppress(Mishap), session.begin_nested():
            service.publish("a")
            session.execute(insert(Order).values(name="a"))
            raise Mishap
        service.publish("b")
        session.commit()

    assert (service.orders, service.sent) == ("", "b")


def test_a_flush_is_a_write_of_the_session_that_flushes(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with delivery(service), sessions() as one, sessions() as other:
        one.scalars(select(Order)).all()
        other.scalars(select(Order)).all()
        with join.scope(one, service.store):
            service.publish("a")
        one.add(Order(name="a"))
        one.flush()

    assert (service.orders, service.sent) == ("", "")


def test_another_engine_on_the_same_database_takes_part_too(service: Service) -> None:
    factory = sessionmaker(create_engine(service.engine.url))
    attach.attach(factory, service.store)
    with suppress(Mishap), delivery(service), factory() as session:
        session.add(Order(name="a"))
        session.commit()
        raise Mishap

    assert service.orders == ""


def test_engines_chosen_by_mapper_take_part_too(service: Service) -> None:
    factory = sessionmaker(binds={Order: service.engine})
    attach.attach(factory, service.store)
    with suppress(Mishap), delivery(service), factory() as session:
        session.add(Order(name="a"))
        service.publish("a")
        session.commit()
        raise Mishap

    assert (service.orders, service.sent) == ("", "")


@pytest.fixture
def elsewhere() -> Iterator[Engine]:
    """Another database."""
    engine = create_engine("sqlite://")
    Order.metadata.create_all(engine)
    yield engine
    engine.dispose()


def test_a_session_on_another_database_is_committed_apart_with_a_warning(
    service: Service, elsewhere: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    factory = sessionmaker(elsewhere)
    attach.attach(factory, service.store)
    for name in "ab":
        with suppress(Mishap), delivery(service), factory() as session:
            session.add(Order(name=name))
            service.publish(name)
            session.commit()
            if name == "a":
                raise Mishap
    with factory() as session:
        rows = session.scalar(select(func.count()).select_from(Order))

    assert (rows, service.sent) == (2, "b")
    assert caplog.text.count("another database") == 1


def test_a_session_that_is_not_attached_is_its_users_own(service: Service) -> None:
    with suppress(Mishap), delivery(service):
        if service.database.vendor == "sqlite":
            pytest.skip("SQLite has one writer")
        with Session(service.engine) as session:
            session.add(Order(name="a"))
            service.publish("a")
            session.commit()
        raise Mishap

    assert (service.orders, service.sent) == ("a", "")


def test_after_the_message_sessions_are_their_own_again(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    with delivery(service) as progress:
        progress.finished = True
        with suppress(Mishap), sessions() as session:
            assert session.get_bind() is service.engine


@pytest.mark.parametrize("ending", ["left open", "closed"])
def test_a_session_that_outlives_a_message_takes_part_in_the_next_one(
    service: Service, sessions: sessionmaker[Session], ending: str
) -> None:
    registry = scoped_session(sessions)
    for name in "abc":
        with suppress(Mishap), delivery(service):
            registry.add(Order(name=name))
            service.publish(name)
            registry.commit()
            if ending == "closed":
                registry.close()
            if name == "b":
                raise Mishap

    registry.remove()
    assert (service.orders, service.sent, service.stored_apart) == ("ac", "ac", [])


def test_a_session_made_before_a_message_takes_part_in_it(
    service: Service, sessions: sessionmaker[Session]
) -> None:
    session = sessions()
    session.add(Order(name="a"))
    service.publish("a")
    session.commit()

    with suppress(Mishap), delivery(service):
        session.add(Order(name="b"))
        session.commit()
        raise Mishap

    session.add(Order(name="c"))
    service.publish("c")
    session.commit()
    session.close()
    assert (service.orders, service.sent) == ("ac", "ac")
