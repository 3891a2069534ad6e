"""A relay waits as long as there is nothing to do, and keeps house meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from celery import Celery
from sqlalchemy import select, update

from celery_eda import EDA
from celery_eda.core.identity import Identity
from celery_eda.core.message import Message
from celery_eda.core.settings import DAY
from celery_eda.databases import upgrade
from celery_eda.inbox.store import InboxStore, Outcome
from celery_eda.outbox.housekeeping import Round
from celery_eda.outbox.relay import Relay
from celery_eda.outbox.result_backend import Prerequisites
from celery_eda.outbox.settlement import RelayResult

ROUNDS = 1100  # a delay that is doubled more often than that is no float any more
#: Seconds between two rounds, and so many rounds that the housekeeping's turn has come.
PAUSE, ENOUGH = 0.005, 100


class Counting(Relay):
    """A relay that ends after so many rounds."""

    last = ROUNDS
    rounds = 0
    confirmed = 0

    def send(self, ids: Sequence[int] = ()) -> RelayResult:
        self.rounds += 1
        if self.rounds == self.last:
            self.stop()
        if not self.confirmed:
            return super().send(ids)
        time.sleep(PAUSE)
        return RelayResult(self.confirmed)


class Stumbling(Counting):
    """A relay with a mistake that shows once."""

    def send(self, ids: Sequence[int] = ()) -> RelayResult:
        self.rounds += 1
        if self.rounds == 1:
            raise AttributeError("a mistake of ours")
        self.stop()
        return RelayResult()


@pytest.fixture
def relay(tmp_path: Path) -> Relay:
    app = Celery(broker="memory://", set_as_current=False)
    app.conf.eda_database_url = f"sqlite:///{tmp_path / 'service.db'}"
    app.conf.eda_relay_poll = 0.001
    eda = EDA(app)
    upgrade.upgrade(eda.databases.engine, eda.databases.tables)
    return eda.outbox.relay()


def test_a_relay_outlives_whatever_goes_wrong_in_a_round(relay: Relay) -> None:
    relay.__class__ = Stumbling

    relay.run()

    assert relay.rounds == 2  # type: ignore[attr-defined]


def test_a_relay_with_nothing_to_send_goes_on_looking(relay: Relay) -> None:
    relay.__class__ = Counting

    relay.run()

    assert relay.rounds == ROUNDS


class Enough(Counting):
    """A relay that ends when the housekeeping has had its turn."""

    last = ENOUGH


class Chores:
    """Housekeeping that notes how far it has come, and how many rounds were made before."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.taken: list[tuple[int, int]] = []
        self.relay: Counting
        self.fails = False

    def start(self) -> Round:
        return Round(self.all())

    def all(self) -> Iterator[int]:
        for step in range(self.steps):
            self.taken.append((step, self.relay.rounds))
            if self.fails:
                raise ConnectionError("the housekeeping's")
            yield step


def counting(tmp_path: Path, chores: Chores, **settings: float) -> Counting:
    """A relay on an empty outbox that does these chores."""
    app = Celery(broker="memory://", set_as_current=False)
    app.conf.update(
        eda_database_url=f"sqlite:///{tmp_path / 'service.db'}", eda_relay_poll=PAUSE, **settings
    )
    eda = EDA(app)
    upgrade.upgrade(eda.databases.engine, eda.databases.tables)
    made = eda.outbox.relay()
    relay = Enough(
        made.engine,
        made.outbox,
        made.dead_letters,
        made.broker,
        made.backend,
        made.settings,
        chores,
    )
    chores.relay = relay
    return relay


def test_between_two_rounds_a_relay_takes_one_step_of_its_housekeeping(tmp_path: Path) -> None:
    chores = Chores(steps=5)

    counting(tmp_path, chores, eda_housekeeping_interval=0.1).run()

    first = chores.taken[:5]
    began = first[0][1]
    assert began > 1
    assert first == [(step, began + step) for step in range(5)]


def test_a_relay_begins_its_housekeeping_anew_after_the_interval(tmp_path: Path) -> None:
    chores = Chores(steps=2)

    counting(tmp_path, chores, eda_housekeeping_interval=0.1).run()

    assert [step for step, _ in chores.taken[:4]] == [0, 1, 0, 1]


def test_before_the_interval_is_over_a_relay_does_no_housekeeping(tmp_path: Path) -> None:
    chores = Chores(steps=2)

    counting(tmp_path, chores, eda_housekeeping_interval=3600).run()

    assert chores.taken == []


def test_while_a_full_batch_is_found_each_time_a_relay_only_sends(tmp_path: Path) -> None:
    chores = Chores(steps=1)
    relay = counting(tmp_path, chores, eda_housekeeping_interval=0.1, eda_relay_batch=7)
    relay.confirmed = 7

    relay.run()

    assert chores.taken == []


def test_housekeeping_that_fails_is_told_and_stops_no_relay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chores = Chores(steps=2)
    chores.fails = True
    relay = counting(tmp_path, chores, eda_housekeeping_interval=0.1)

    relay.run()

    assert relay.rounds == ENOUGH
    assert len(chores.taken) > 1
    assert "the housekeeping's" in caplog.text


def test_a_relay_of_an_app_keeps_its_tables_small(tmp_path: Path) -> None:
    app = Celery(broker="memory://", set_as_current=False)
    app.conf.update(
        eda_database_url=f"sqlite:///{tmp_path / 'service.db'}",
        eda_relay_poll=PAUSE,
        eda_housekeeping_interval=0.1,
    )
    eda = EDA(app)
    upgrade.upgrade(eda.databases.engine, eda.databases.tables)
    inbox = InboxStore(eda.databases.tables.inbox, eda.databases.dialect)
    with eda.databases.engine.begin() as connection:
        inbox.record_failure(connection, "shop.charge", Identity.fresh(), Outcome.done)
        connection.execute(update(inbox.table).values(at=eda.databases.dialect.later(-30 * DAY)))
    relay = eda.outbox.relay()
    relay.__class__ = Enough

    relay.run()

    with eda.databases.engine.connect() as connection:
        assert connection.execute(select(inbox.table)).all() == []


def test_what_cannot_be_prepared_holds_up_no_other(relay: Relay) -> None:
    messages = [
        Message(
            identity=Identity.fresh(),
            task="shop.quote",
            body=b"[[], {}, {}]",
            content_type="application/json",
            content_encoding="utf-8",
            headers={"id": name},
            properties={},
            exchange="",
            routing_key="celery",
            queue="celery",
            prerequisites=(("declare", name),),
        )
        for name in ("refused", "taken")
    ]
    with relay.engine.begin() as connection:
        relay.outbox.add(connection, messages)

    def prepare(prerequisites: Prerequisites, identity: Identity) -> None:
        if ("declare", "refused") in prerequisites:
            raise LookupError("the queue is there already, but another one")

    relay.backend = SimpleNamespace(run=prepare)

    assert relay.send() == RelayResult(confirmed=1, refused=1)
    with relay.engine.connect() as connection:
        (why,) = connection.scalars(select(relay.outbox.table.c.last_error))
    assert "another one" in why
