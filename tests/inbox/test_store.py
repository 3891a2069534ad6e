from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from threading import Barrier
from typing import TypeVar

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from celery_eda.core.identity import Identity
from celery_eda.databases.lost_race import LostRace
from celery_eda.inbox.attempts import Attempts
from celery_eda.inbox.store import InboxStore, Outcome, RecordedOutcome
from tests.support.databases import LOCKING, Database

T = TypeVar("T")
only_locking = pytest.mark.parametrize("database", LOCKING, indirect=True)
only_leasing = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
DONE = RecordedOutcome(Outcome.done, b"42")
LOOKALIKES = ["shop.pay", "Shop.pay", "shop.pay ", "shop.páy", "shop.pa\u0301y", "shop.pay\u00a0"]


def until_it_passes(database: Database, step: Callable[[Connection], T]) -> T:
    """What *step* returns in a transaction that lost against no other one."""
    while True:
        with database.engine.connect() as connection:
            try:
                return step(connection)
            except DBAPIError as error:
                if not database.dialect.is_transient(error):
                    raise


def take_effect(
    database: Database, inbox: InboxStore, consumer: str, identity: Identity, result: bytes = b"42"
) -> RecordedOutcome | None:
    """What the road does with a message: None if it took effect, else what the earlier copy did."""

    def attempt(connection: Connection) -> bool:
        if inbox.admit(connection, consumer, identity):
            return False
        try:
            inbox.record(connection, consumer, identity, result=result)
        except LostRace:
            return False
        connection.commit()
        return True

    if until_it_passes(database, attempt):
        return None
    return recorded(database, inbox, consumer, identity)


def recorded(
    database: Database, inbox: InboxStore, consumer: str, identity: Identity
) -> RecordedOutcome | None:
    with database.engine.connect() as connection:
        return inbox.find(connection, consumer, identity)


# ── the inbox ───────────────────────────────────────────────────────────────────────────────────


def test_a_message_takes_effect_once_and_its_copies_see_the_result(
    database: Database, inbox: InboxStore
) -> None:
    identity = Identity.fresh()

    endings = [take_effect(database, inbox, "shop.pay", identity) for _ in range(3)]

    assert endings == [None, DONE, DONE]


def test_five_copies_at_once_take_effect_once_and_the_others_see_the_result(
    database: Database, inbox: InboxStore
) -> None:
    for _ in range(5):
        identity, start = Identity.fresh(), Barrier(5)

        def copy(identity: Identity = identity, start: Barrier = start) -> RecordedOutcome | None:
            start.wait(60)
            return take_effect(database, inbox, "shop.pay", identity)

        with ThreadPoolExecutor(5) as workers:
            endings = [each.result(120) for each in [workers.submit(copy) for _ in range(5)]]

        assert endings.count(None) == 1
        assert endings.count(DONE) == 4


def test_a_rolled_back_admission_leaves_the_message_fresh(
    database: Database, inbox: InboxStore
) -> None:
    identity = Identity.fresh()
    with database.engine.connect() as connection:
        inbox.admit(connection, "shop.pay", identity)
        inbox.record(connection, "shop.pay", identity)
        connection.rollback()

    assert take_effect(database, inbox, "shop.pay", identity) is None


@only_locking
@pytest.mark.parametrize("end", ["commit", "rollback", "invalidate"])
def test_a_copy_waits_for_the_end_of_the_one_in_progress(
    database: Database, inbox: InboxStore, end: str
) -> None:
    identity = Identity.fresh()
    with database.engine.connect() as first, ThreadPoolExecutor(1) as worker:
        assert inbox.admit(first, "shop.pay", identity) is None
        inbox.record(first, "shop.pay", identity, result=b"42")
        copy: Future[RecordedOutcome | None] = worker.submit(
            take_effect, database, inbox, "shop.pay", identity, b"of the copy"
        )
        with pytest.raises(NotYet):
            copy.result(0.3)

        getattr(first, end)()

        assert copy.result(120) == (DONE if end == "commit" else None)


@only_leasing
def test_a_copy_that_ends_later_finds_that_the_other_one_got_ahead(
    database: Database, inbox: InboxStore
) -> None:
    identity = Identity.fresh()
    with database.engine.connect() as slow:
        assert inbox.admit(slow, "shop.pay", identity) is None
        assert take_effect(database, inbox, "shop.pay", identity) is None

        with pytest.raises(LostRace):
            inbox.record(slow, "shop.pay", identity, result=b"too late")

    assert recorded(database, inbox, "shop.pay", identity) == DONE


def test_consumers_whose_names_only_look_alike_are_different_consumers(
    database: Database, inbox: InboxStore
) -> None:
    identity = Identity.fresh()

    endings = [take_effect(database, inbox, each, identity, each.encode()) for each in LOOKALIKES]

    assert endings == [None] * len(LOOKALIKES)
    for each in LOOKALIKES:
        assert recorded(database, inbox, each, identity) == RecordedOutcome(
            Outcome.done, each.encode()
        )


def test_each_revision_of_a_message_is_handled_once(database: Database, inbox: InboxStore) -> None:
    identity = Identity.fresh()

    assert take_effect(database, inbox, "shop.pay", identity) is None
    assert take_effect(database, inbox, "shop.pay", identity.next) is None
    assert take_effect(database, inbox, "shop.pay", identity) == DONE


@pytest.mark.parametrize("outcome", Outcome)
def test_an_admission_can_be_completed_with_any_outcome(
    database: Database, inbox: InboxStore, outcome: Outcome
) -> None:
    identity = Identity.fresh()
    with database.engine.begin() as connection:
        inbox.admit(connection, "shop.pay", identity)
        inbox.record(connection, "shop.pay", identity, outcome)

    assert recorded(database, inbox, "shop.pay", identity) == RecordedOutcome(outcome, None)


@pytest.mark.parametrize("result", [b"", b"\0", bytes(range(256)) * 1024])
def test_a_result_is_read_as_it_was_recorded(
    database: Database, inbox: InboxStore, result: bytes
) -> None:
    identity = Identity.fresh()

    take_effect(database, inbox, "shop.pay", identity, result)

    assert recorded(database, inbox, "shop.pay", identity) == RecordedOutcome(Outcome.done, result)


def test_an_attempt_that_took_effect_cannot_be_closed_as_a_failure(
    database: Database, inbox: InboxStore
) -> None:
    identity = Identity.fresh()
    take_effect(database, inbox, "shop.pay", identity)

    with database.engine.begin() as connection:
        closed = inbox.record_failure(connection, "shop.pay", identity, Outcome.dead)

    assert not closed
    assert recorded(database, inbox, "shop.pay", identity) == DONE


def test_a_conflict_leaves_the_transaction_usable(database: Database, inbox: InboxStore) -> None:
    taken, fresh = Identity.fresh(), Identity.fresh()
    take_effect(database, inbox, "shop.pay", taken)

    with database.engine.begin() as connection:
        assert not inbox.record_failure(connection, "shop.pay", taken, Outcome.dead)
        assert inbox.record_failure(connection, "shop.pay", fresh, Outcome.retried)

    assert recorded(database, inbox, "shop.pay", fresh) == RecordedOutcome(Outcome.retried, None)


def test_a_row_that_the_table_refuses_is_an_error_and_not_a_copy(
    database: Database, inbox: InboxStore
) -> None:
    values = {"consumer": None, "message_id": Identity.fresh().id, "revision": 0, "outcome": "done"}

    with database.engine.connect() as connection, pytest.raises(DBAPIError):
        database.dialect.insert_once(connection, inbox.table, values, now="at")


# ── the attempts ────────────────────────────────────────────────────────────────────────────────


def test_redeliveries_are_counted_for_each_consumer_message_and_revision(
    database: Database, attempts: Attempts
) -> None:
    identity = Identity.fresh()
    deliveries = [
        *[("shop.pay", identity)] * 3,
        ("shop.pay ", identity),
        ("shop.pay", identity.next),
        ("shop.pay", identity),
    ]

    counts = []
    for consumer, each in deliveries:
        with database.engine.begin() as connection:
            counts.append(attempts.count(connection, consumer, each))

    assert counts == [1, 2, 3, 1, 1, 4]


def test_a_message_that_had_an_outcome_is_counted_afresh(
    database: Database, attempts: Attempts
) -> None:
    identity = Identity.fresh()

    with database.engine.begin() as connection:
        attempts.count(connection, "shop.pay", identity)
        attempts.count(connection, "shop.pay", identity)
        attempts.delete(connection, "shop.pay", identity)

        assert attempts.count(connection, "shop.pay", identity) == 1


def test_copies_that_are_counted_at_once_are_all_counted(
    database: Database, attempts: Attempts
) -> None:
    identity, start = Identity.fresh(), Barrier(5)

    def count(connection: Connection) -> int:
        number = attempts.count(connection, "shop.pay", identity)
        connection.commit()
        return number

    def deliver() -> int:
        start.wait(60)
        return until_it_passes(database, count)

    with ThreadPoolExecutor(5) as workers:
        counts = [each.result(120) for each in [workers.submit(deliver) for _ in range(5)]]

    assert sorted(counts) == [1, 2, 3, 4, 5]
