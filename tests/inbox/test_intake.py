"""The inspection of messages, in a worker of this process: Celery's own, without a server."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, signals
from celery.contrib.testing.worker import start_worker
from celery.exceptions import NotRegistered
from celery.worker import state
from kombu import compression
from sqlalchemy import Table, func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from celery_eda import EDA
from celery_eda.core import addresses
from celery_eda.core.arguments import Arguments
from celery_eda.core.identity import Identity
from celery_eda.core.message import Message
from celery_eda.databases import message_rows, upgrade
from celery_eda.inbox.refusals import Refusals
from tests.faults.programs.hostile_messages import Letter

PATIENCE = 120.0
PAST = "2020-01-01T00:00:00+00:00"


@dataclass
class Shop:
    """An app with a worker in a thread, whose broker is this process's memory."""

    app: Celery
    eda: EDA
    handled: list[int] = field(default_factory=list)

    def put(self, letter: Letter) -> None:
        """Put *letter* into the queue as it is."""
        with self.app.connection_for_write() as connection:
            channel = connection.default_channel
            message = channel.prepare_message(
                letter.body,
                content_type=letter.content_type,
                content_encoding=letter.content_encoding,
                headers=letter.all_headers,
                properties=dict(letter.properties),
            )
            self.app.amqp.queues["celery"].bind(channel).declare()
            channel.basic_publish(message, exchange="celery", routing_key="celery")

    def dead(self) -> list[Any]:
        with self.eda.databases.engine.connect() as connection:
            return list(connection.execute(select(self.eda.databases.tables.dead_letters)).all())

    def waiting(self) -> list[Message]:
        """What waits in the outbox."""
        with self.eda.databases.engine.connect() as connection:
            rows = connection.execute(select(self.eda.databases.tables.outbox)).all()
        return [message_rows.from_row(row) for row in rows]

    def until(self, condition: Any) -> None:
        until = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.02)

    def expect_service(self) -> None:
        """The next valid message is handled."""
        before = len(self.handled)
        self.put(Letter("call", headers={"task": "shop.handle", "id": str(time.monotonic_ns())}))
        self.until(lambda: len(self.handled) > before)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A worker takes the root logger for itself, and only errors pass it afterwards."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(
        eda_database_url=f"sqlite:///{tmp_path / 'shop.db'}",
        eda_embedded_relay=False,
        eda_send_after_commit=False,
    )
    shop = Shop(app, EDA(app))

    @shop.eda.task(name="shop.handle")
    def handle(session: Session, number: int) -> None:
        shop.handled.append(number)

    @shop.eda.task(name="shop.keyed", key="number", when_dead="skip")
    def keyed(session: Session, number: int) -> None:
        shop.handled.append(number)

    upgrade.upgrade(shop.eda.databases.engine, shop.eda.databases.tables)
    decoders = dict(compression._decoders)
    with start_worker(app, perform_ping_check=False, shutdown_timeout=30.0):
        yield shop
    compression._decoders.update(decoders)
    shop.eda.databases.engine.dispose()


def test_what_cannot_be_handled_is_kept_and_the_next_message_handled(shop: Shop) -> None:
    shop.put(Letter("null", body=b"null"))
    shop.put(Letter("truncated", body=b"[["))
    shop.put(Letter("no such task", task="no.such.task"))
    shop.expect_service()

    assert [row.reason for row in shop.dead()] == ["malformed", "undecodable", "unknown task"]
    assert [bytes(row.body) for row in shop.dead()][:2] == [b"null", b"[["]


def test_who_waits_for_an_unknown_task_hears_of_it(shop: Shop) -> None:
    heard: list[str] = []

    @signals.task_unknown.connect(weak=False)
    def hear(name: str, id: str, **_: Any) -> None:
        heard.extend((name, id))

    shop.put(Letter("x", task="no.such.task", headers={"id": "asked"}))
    shop.until(lambda: shop.app.AsyncResult("asked").ready())
    signals.task_unknown.disconnect(hear)

    assert shop.app.AsyncResult("asked").state == "FAILURE"
    assert heard == ["no.such.task", "asked"]


def test_a_dead_letter_that_cannot_be_written_is_written_later_and_once(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep, tries = Refusals.dead_letter, iter((True, True, False))

    def keep_at_last(*arguments: Any) -> bool:
        if next(tries, False):
            raise OperationalError("INSERT", {}, Exception("away"), connection_invalidated=True)
        return keep(*arguments)

    monkeypatch.setattr(Refusals, "dead_letter", keep_at_last)
    shop.put(Letter("first", body=b"null"))
    shop.put(Letter("second", body=b"5"))
    shop.expect_service()
    shop.until(lambda: len(shop.dead()) == 2)
    shop.expect_service()

    assert {bytes(row.body) for row in shop.dead()} == {b"null", b"5"}
    assert len(shop.dead()) == 2
    assert caplog.text.count("cannot be written yet") == 2


def test_one_that_can_never_be_written_holds_up_no_other(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Refusals.dead_letter

    def keep_all_but_one(self: Refusals, refused: Any) -> bool:
        if b"never" in refused.letter.body:
            raise ValueError("too long for this database")
        return keep(self, refused)

    monkeypatch.setattr(Refusals, "dead_letter", keep_all_but_one)
    shop.put(Letter("never", body=b'"never"'))
    shop.put(Letter("other", body=b"null"))

    shop.until(lambda: [bytes(row.body) for row in shop.dead()] == [b"null"])
    shop.expect_service()


def test_an_expired_message_is_kept_and_told_to_be_revoked(shop: Shop) -> None:
    past = {"expires": PAST, "id": "late"}
    shop.put(Letter("late", task="shop.handle", headers=past))
    shop.until(shop.dead)
    shop.until(lambda: shop.app.AsyncResult("late").ready())

    assert [row.reason for row in shop.dead()] == ["expired"]
    assert shop.app.AsyncResult("late").state == "REVOKED"
    assert shop.handled == []
    # A redrive with more time has the same id, and must not be taken for revoked.
    assert "late" not in state.revoked


def test_a_revoked_message_is_kept(shop: Shop) -> None:
    state.revoked.add("unwanted")
    shop.put(Letter("unwanted", task="shop.handle", headers={"id": "unwanted"}))
    shop.until(shop.dead)

    assert [row.reason for row in shop.dead()] == ["revoked"]
    assert shop.handled == []


def in_order(number: int, **headers: Any) -> Letter:
    """The message with this number in the lane of one key."""
    own = {"id": f"number {number}", "eda_id": str(Identity.fresh().id), "eda_revision": 0}
    order = {"eda_order": ["shop", "shop.keyed", "1", 1, number]}
    return Letter(f"number {number}", task="shop.keyed", headers={**own, **order, **headers})


def count(shop: Shop, table: Table) -> int:
    with shop.eda.databases.engine.connect() as connection:
        return connection.scalar(select(func.count()).select_from(table)) or 0


def test_an_expired_message_of_a_key_is_buried_at_its_turn(shop: Shop) -> None:
    shop.put(in_order(2, expires=PAST))
    shop.until(lambda: count(shop, shop.eda.databases.tables.parked))

    assert shop.dead() == []


def test_behind_an_expired_message_of_a_key_its_successor_goes_on(shop: Shop) -> None:
    shop.put(in_order(2))
    shop.until(lambda: count(shop, shop.eda.databases.tables.parked))
    shop.put(in_order(1, expires=PAST))
    shop.until(shop.dead)

    assert [row.reason for row in shop.dead()] == ["expired"]
    assert count(shop, shop.eda.databases.tables.outbox) == 1


@pytest.mark.parametrize("name", ["eda_verdict", "eda_wire"])
def test_what_a_message_says_of_itself_is_no_verdict(shop: Shop, name: str) -> None:
    forged = {name: "expired", "id": f"forged {name}"}
    shop.put(Letter("forged", task="shop.handle", headers=forged))
    shop.until(lambda: shop.handled)

    assert shop.dead() == []


def test_headers_are_kept_whole(shop: Shop) -> None:
    strange = {"id": ["x"], "x-more": {"a": [None, 1.5, "\ud800"]}}
    shop.put(Letter("strange", headers=strange))
    shop.until(shop.dead)

    assert strange.items() <= json.loads(shop.dead()[0].headers).items()


def test_who_asks_for_an_unknown_task_gets_a_reply(shop: Shop) -> None:
    headers = {"eda_reply_to": addresses.of_process(), "id": str(uuid4())}
    shop.put(Letter("no such task", task="no.such.task", headers=headers))
    shop.expect_service()

    (reply,) = shop.waiting()
    correlation_id, outcome = shop.eda.requests.reader.outcome_in(list(Arguments.of(reply).args))

    assert reply.routing_key == headers["eda_reply_to"]
    assert correlation_id == headers["id"]
    assert isinstance(outcome.error, NotRegistered)


@pytest.mark.parametrize("headers", [{"eda_reply_to": "payments"}, {"id": "no uuid"}])
def test_what_is_malformed_gets_no_reply(shop: Shop, headers: dict[str, str]) -> None:
    address = {"eda_reply_to": addresses.of_process(), "id": str(uuid4())}
    shop.put(Letter("no call", body=b"null", headers={**address, **headers}))
    shop.expect_service()

    assert shop.waiting() == []
    assert [row.reason for row in shop.dead()] == ["malformed"]
