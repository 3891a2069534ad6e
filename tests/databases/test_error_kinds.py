from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pymysql
import pytest
from celery import Celery
from sqlalchemy import Connection, create_engine, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, ProgrammingError

from celery_eda import EDA
from celery_eda.core.service import service_of
from celery_eda.databases import Databases
from celery_eda.databases.message_rows import to_row
from celery_eda.outbox.store import OutboxStore
from tests.support.databases import LOCKING, Database
from tests.support.messages import message
from tests.support.server_errors import (
    NO_ROOM,
    READ_ONLY,
    REFUSALS,
    server_error,
    statements_of,
)

only_locking = pytest.mark.parametrize("database", LOCKING, indirect=True)
only_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


def kinds(database: Database, error: BaseException) -> tuple[bool, bool]:
    """Whether it will pass when the transaction is run again, and whether the server is away."""
    return database.dialect.is_transient(error), database.dialect.is_outage(error)


@only_locking
def test_a_deadlock_will_pass(database: Database, outbox: OutboxStore) -> None:
    with database.engine.begin() as connection:
        one, other = outbox.add(connection, [message(), message()])
    table, both_hold_one = outbox.table, Barrier(2)

    def touch(connection: Connection, id: int) -> None:
        connection.execute(update(table).where(table.c.id == id).values(task="touched"))

    def crosswise(first: int, second: int) -> BaseException | None:
        with database.engine.connect() as connection:
            touch(connection, first)
            both_hold_one.wait(60)
            try:
                touch(connection, second)
            except DBAPIError as error:
                return error
            return None

    with ThreadPoolExecutor(2) as workers:
        ends = [workers.submit(crosswise, one, other), workers.submit(crosswise, other, one)]
        errors = [error for end in ends if (error := end.result(120))]

    assert [kinds(database, error) for error in errors] == [(True, False)]


@only_sqlite
@pytest.mark.parametrize("statement", ["UPDATE eda_outbox SET attempts = 1", "SAVEPOINT one"])
def test_a_busy_database_will_pass(database: Database, statement: str) -> None:
    impatient = create_engine(database.engine.url, connect_args={"timeout": 0.1})
    database.dialect.configure_engine(impatient, database.dialect.claim_timeout)

    with database.engine.connect() as writer, impatient.connect() as connection:
        writer.execute(text("DELETE FROM eda_outbox"))
        with pytest.raises(OperationalError) as refusal:
            connection.execute(text(statement))

    assert kinds(database, refusal.value) == (True, False)
    impatient.dispose()


@only_sqlite
def test_a_file_that_cannot_be_opened_is_an_outage(database: Database) -> None:
    nowhere = create_engine("sqlite:////nowhere/service.db")

    with pytest.raises(OperationalError) as refusal:
        nowhere.connect()

    assert kinds(database, refusal.value) == (False, True)


@only_locking
def test_a_server_that_is_killed_is_away_until_it_is_back(
    database: Database, request: pytest.FixtureRequest
) -> None:
    server: Any = request.getfixturevalue(database.vendor)
    with database.engine.connect() as connection:
        connection.execute(select(1))
        server.kill()

        with pytest.raises(DBAPIError) as cut_off:
            connection.execute(select(1))
    with pytest.raises(DBAPIError) as refused:
        database.engine.connect()
    server.start()

    assert kinds(database, cut_off.value) == (False, True)
    assert kinds(database, refused.value) == (False, True)
    with database.engine.connect() as connection:
        assert connection.scalar(select(1)) == 1


@only_locking
def test_a_connection_that_the_operator_ends_is_an_outage(database: Database) -> None:
    own_id, end = {
        "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})"),
        "mariadb": ("SELECT connection_id()", "KILL {}"),
    }[database.vendor]
    with database.engine.connect() as connection, database.engine.connect() as operator:
        number = connection.exec_driver_sql(own_id).scalar()
        operator.exec_driver_sql(end.format(number))

        with pytest.raises(DBAPIError) as refusal:
            connection.execute(select(1))

    assert kinds(database, refusal.value) == (False, True)


def test_a_mistake_in_a_statement_will_not_pass(database: Database) -> None:
    with (
        database.engine.connect() as connection,
        pytest.raises((ProgrammingError, OperationalError)) as refusal,
    ):
        connection.execute(text("SELECT nothing FROM nowhere"))

    assert kinds(database, refusal.value) == (False, False)


def test_a_violated_constraint_will_not_pass(database: Database, outbox: OutboxStore) -> None:
    row = {**to_row(message()), "id": 1, "created_at": database.dialect.now()}
    del row["delay"]
    with database.engine.connect() as connection:
        connection.execute(outbox.table.insert().values(row))
        with pytest.raises(IntegrityError) as refusal:
            connection.execute(outbox.table.insert().values(row))

    assert kinds(database, refusal.value) == (False, False)


def test_an_error_of_the_handler_is_none_of_the_database_s(database: Database) -> None:
    assert kinds(database, ValueError("database is locked")) == (False, False)


@only_locking
def test_a_transaction_that_the_database_gave_up_is_noticed(database: Database) -> None:
    gives_up = database.vendor == "postgresql"
    with database.engine.connect() as connection:
        connection.execute(select(1))
        before = database.dialect.is_aborted(connection)
        with pytest.raises(DBAPIError):
            connection.execute(text("SELECT nothing FROM nowhere"))

        assert (before, database.dialect.is_aborted(connection)) == (False, gives_up)


@only_sqlite
def test_a_transaction_that_read_first_may_still_write(
    database: Database, outbox: OutboxStore
) -> None:
    with database.engine.connect() as reader, database.engine.begin() as writer:
        reader.execute(select(outbox.table)).all()
        outbox.add(writer, [message()])
        writer.commit()

        outbox.add(reader, [message()])
        reader.commit()

        assert len(reader.execute(select(outbox.table)).all()) == 2


@only_sqlite
def test_a_released_savepoint_commits_nothing(database: Database, outbox: OutboxStore) -> None:
    with database.engine.connect() as connection:
        with connection.begin_nested():
            outbox.add(connection, [message()])
        connection.rollback()

        assert connection.execute(select(outbox.table)).all() == []


# ── what the server says ─────────────────────────────────────────────────────────────────────────

#: Those after which the same statement may be repeated; the others of REFUSALS say nothing.
BUSY = ("40P01", 1205, "SQLITE_BUSY")


def refusal_of(database: Database, code: Any) -> tuple[BaseException, bool]:
    """The error of a statement refused with *code*, and whether its connection is dropped."""
    with statements_of(database.engine) as statements, database.engine.connect() as connection:
        with (
            statements.refused(server_error(database.vendor, code), 0),
            pytest.raises(DBAPIError) as refusal,
        ):
            connection.execute(select(1))
        return refusal.value, connection.invalidated


def test_a_server_that_takes_no_writes_is_away_and_its_connection_is_dropped(
    database: Database,
) -> None:
    for code in READ_ONLY[database.vendor]:
        error, dropped = refusal_of(database, code)

        assert kinds(database, error) == (False, True), code
        assert dropped, code


def test_a_server_without_room_is_away(database: Database) -> None:
    for code in NO_ROOM[database.vendor]:
        error, _ = refusal_of(database, code)

        assert kinds(database, error) == (False, True), code


def test_other_refusals_are_no_outages(database: Database) -> None:
    for code in REFUSALS[database.vendor]:
        error, dropped = refusal_of(database, code)

        assert kinds(database, error) == (code in BUSY, False), code
        assert not dropped, code


@pytest.mark.parametrize("database", ["mariadb"], indirect=True)
def test_another_option_of_the_server_is_no_outage(database: Database) -> None:
    error = pymysql.err.OperationalError(
        1290, "The MariaDB server is running with the --secure-file-priv option so it cannot"
    )
    with statements_of(database.engine) as statements, database.engine.connect() as connection:
        with statements.refused(error, 0), pytest.raises(DBAPIError) as refusal:
            connection.execute(select(1))

        assert not connection.invalidated
    assert kinds(database, refusal.value) == (False, False)


@only_sqlite
def test_a_commit_that_fails_leaves_no_transaction_in_the_pool(
    database: Database, outbox: OutboxStore
) -> None:
    error = server_error("sqlite", None)
    with (
        statements_of(database.engine) as statements,
        database.engine.connect() as connection,
    ):
        outbox.add(connection, [message()])
        with statements.refused(error, 0), pytest.raises(OperationalError):
            connection.commit()

    with database.engine.connect() as connection:
        assert connection.execute(select(outbox.table)).all() == []


def test_a_given_engine_drops_connections_to_a_read_only_server_too(database: Database) -> None:
    engine = create_engine(database.engine.url)
    app = Celery(broker="memory://", set_as_current=False)
    EDA(app, engine=engine)
    assert service_of(app).wing(Databases).engine is engine
    code = next(iter(READ_ONLY[database.vendor]))

    error, dropped = refusal_of(replace(database, engine=engine), code)

    assert dropped
    assert isinstance(error, DBAPIError)
    engine.dispose()
