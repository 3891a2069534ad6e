"""Errors at and after the commit, keys outside of transactions, and apps and engines of others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Engine, create_engine, event, insert
from sqlalchemy.exc import OperationalError

from celery_eda import EDA
from celery_eda.errors import OtherBroker
from tests.faults.programs.tables import effects
from tests.support.databases import Database
from tests.support.worker_slot import Slot


@pytest.fixture
def mail(slot: Slot) -> Any:
    """A reliable task."""

    @slot.task
    def mail(number: int) -> None:
        pass

    return mail


# ── the commit ──────────────────────────────────────────────────────────────────────────────


def test_a_connection_lost_before_the_commit_raises_the_error_of_the_driver(
    slot: Slot, mail: Any
) -> None:
    if slot.database.vendor == "sqlite":
        pytest.skip("SQLite has no connection to lose")

    def lose_the_connection() -> None:
        with slot.eda.transaction() as session:
            session.execute(insert(effects).values(name="effect", number=1))
            mail.delay(1)
            pid = session.connection().exec_driver_sql("SELECT pg_backend_pid()").scalar()
            with slot.engine.begin() as other:
                other.exec_driver_sql(f"SELECT pg_terminate_backend({pid})")

    with pytest.raises(OperationalError):
        lose_the_connection()

    assert (slot.effects(), slot.waiting()) == ([], [])


def test_no_thread_to_be_had_after_the_commit_is_no_error_of_the_transaction(
    slot: Slot, mail: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slot.app.conf.eda_send_after_commit = True

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with slot.eda.transaction():
            mail.delay(1)
        mail.delay(2)  # stored in a transaction of its own

    assert slot.waiting() == ["mail", "mail"]
    assert "left to the relays" in caplog.text


# ── keys ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rule", [None, "send", "store"])
def test_a_message_with_a_key_gets_its_place_outside_of_transactions_too(
    slot: Slot, rule: str | None
) -> None:
    @slot.app.task(shared=False, name="plain")
    def plain(number: int) -> None:
        pass

    slot.app.conf.eda_outside = rule
    slot.app.send_task("other.work", (1,), key="k")
    plain.apply_async((1,), key="k")
    slot.app.signature("other.work", (1,)).apply_async(key="k")

    assert [each.position.number for each in slot.sent()] == [1, 1, 2]


# ── another app ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def other(slot: Slot) -> Iterator[EDA]:
    """A service with a broker and a database of its own, in the same process."""
    app = Celery("other", broker="redis://127.0.0.1:1/0", set_as_current=False)
    app.conf.eda_send_after_commit = False
    yield EDA(app, engine=slot.engine)
    app.close()


def test_a_task_of_an_app_with_another_broker_is_refused(slot: Slot, other: EDA) -> None:
    @other.task(name="count")
    def count(number: int) -> None:
        pass

    with other.transaction():
        count.delay(1)  # makes a template
    slot.sent()
    with slot.eda.transaction(), pytest.raises(OtherBroker, match="of the app 'other'"):
        count.delay(2)
    with slot.eda.transaction(), slot.eda.outside():
        count.delay(3)

    assert slot.waiting() == ["count"]


# ── another way to connect ──────────────────────────────────────────────────────────────────


def engine_with_creator(database: Database) -> Engine:
    """An engine whose URL does not say where the database is."""
    made = create_engine(database.engine.url)

    def connect() -> Any:
        arguments, parameters = made.dialect.create_connect_args(made.url)
        return made.dialect.connect(*arguments, **parameters)

    return create_engine(f"{made.url.drivername}://", creator=connect)


def engine_with_listener(database: Database) -> Engine:
    """An engine whose connections get their address at the last moment, like a token of IAM."""
    url = database.engine.url
    hidden = url.set(database="nowhere") if database.vendor != "sqlite" else url
    engine = create_engine(hidden)

    @event.listens_for(engine, "do_connect")
    def complete(dialect: Any, record: Any, arguments: Any, parameters: dict[str, Any]) -> None:
        _, right = dialect.create_connect_args(url)
        parameters.update(right)

    return engine


@pytest.mark.parametrize("make", [engine_with_creator, engine_with_listener])
def test_relays_connect_as_the_given_engine_does(slot: Slot, make: Any) -> None:
    app = Celery("given", broker="memory://", set_as_current=False)
    app.conf.eda_send_after_commit = False
    engine = make(slot.database)
    eda = EDA(app, engine=engine)
    with eda.transaction():
        app.send_task("elsewhere.work")
    done = eda.outbox.relay().drain()

    assert done.confirmed == 1
    assert eda.databases.relay_engine.pool is not engine.pool
