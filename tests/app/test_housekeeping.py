"""What housekeeping deletes, what it keeps, and what it sends on its way, on each database."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Table, delete, func, insert, select, update

from celery_eda.core.identity import Identity, Lane, Position
from celery_eda.core.message import Message
from celery_eda.core.settings import DAY, Settings
from celery_eda.databases.retention import Retention, ago
from celery_eda.dead_letters.audit import Audit
from celery_eda.dead_letters.letter import Reason
from celery_eda.dead_letters.store import DeadLetterStore
from celery_eda.inbox.attempts import Attempts
from celery_eda.inbox.ordering import ReleasedMessages
from celery_eda.inbox.store import InboxStore, Outcome, RecordedOutcome
from celery_eda.ordering.cursor import Cursor
from celery_eda.ordering.cursors import Cursors
from celery_eda.outbox.housekeeping import BATCH, Housekeeping
from celery_eda.outbox.store import OutboxStore
from celery_eda.requests.remote_errors import RemoteErrors
from celery_eda.requests.store import RequestStore
from celery_eda.sagas.record import Kind, Record
from celery_eda.sagas.store import SagaInstance, SagaStore, State
from tests.support.databases import LOCKING, Database
from tests.support.messages import message

CONSUMER = "shop.charge"
LANE = Lane("shop", CONSUMER, "account 7")
SETTINGS = Settings()
INBOX, LETTERS, AUDIT = 14 * DAY, 90 * DAY, 365 * DAY
only_locking = pytest.mark.parametrize("database", LOCKING, indirect=True)


@pytest.fixture
def cursors(database: Database) -> Cursors:
    return Cursors(database.tables.cursors, database.tables.parked, database.dialect)


@pytest.fixture
def housekeeping(database: Database, outbox: OutboxStore, cursors: Cursors) -> Housekeeping:
    return make(database, outbox, cursors)


def sagas_of(database: Database) -> SagaStore:
    tables = database.tables
    return SagaStore(tables.sagas, tables.saga_steps, database.dialect, RemoteErrors())


def make(
    database: Database, outbox: OutboxStore, cursors: Cursors, **settings: float | None
) -> Housekeeping:
    tables, dialect = database.tables, database.dialect
    chosen = Settings(**settings)  # type: ignore[arg-type]
    return Housekeeping(
        database.engine,
        (
            ReleasedMessages(cursors, outbox, chosen.transaction_timeout),
            DeadLetterStore(tables.dead_letters, dialect).retention(
                tables.audit, chosen.dead_letter_retention
            ),
            InboxStore(tables.inbox, dialect).retention(
                tables.dead_letters, tables.parked, tables.outbox, chosen.inbox_retention
            ),
            Attempts(tables.attempts, dialect).retention(chosen.inbox_retention),
            RequestStore(tables.requests, dialect, None, "json").retention(
                chosen.request_retention
            ),
            Audit(tables.audit, dialect).retention(tables.dead_letters, chosen.audit_retention),
            sagas_of(database).retention(chosen.saga_retention),
        ),
    )


def age(database: Database, table: Table, seconds: float, *where: Any, column: str = "at") -> None:
    """Let the rows be as old as that."""
    with database.engine.begin() as connection:
        moment = database.dialect.later(-seconds)
        connection.execute(update(table).where(*where).values({column: moment}))


def handle(database: Database, *ages: float) -> list[Identity]:
    """Messages that took effect so many seconds ago."""
    table, identities = database.tables.inbox, [Identity.fresh() for _ in ages]
    with database.engine.begin() as connection:
        connection.execute(
            insert(table).values(at=database.dialect.now()),
            [
                {"consumer": CONSUMER, "message_id": each.id, "revision": 0, "outcome": "done"}
                for each in identities
            ],
        )
    for identity, seconds in zip(identities, ages, strict=True):
        if seconds:
            age(database, table, seconds, table.c.message_id == identity.id)
    return identities


def bury(
    database: Database, letters: DeadLetterStore, sent: Message, seconds: float, state: str
) -> int:
    """A dead letter of that age."""
    table = letters.table
    with database.engine.begin() as connection:
        letters.add(
            connection, sent, Reason.failed, error=ValueError(), attempts=1, consumer=CONSUMER
        )
        number: int = connection.execute(select(func.max(table.c.id))).scalar_one()
        connection.execute(update(table).where(table.c.id == number).values(state=state))
    age(database, table, seconds, table.c.id == number)
    return number


def note(database: Database, letter: int | None, seconds: float) -> None:
    """An entry of that age in the audit."""
    with database.engine.begin() as connection:
        connection.execute(
            insert(database.tables.audit).values(
                at=database.dialect.later(-seconds),
                actor="ada",
                action="redrive",
                dead_letter=letter,
            )
        )


def remembered(database: Database) -> set[UUID]:
    with database.engine.connect() as connection:
        return set(connection.scalars(select(database.tables.inbox.c.message_id)))


def count(database: Database, table: Table) -> int:
    with database.engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def ids(*identities: Identity) -> set[UUID]:
    return {each.id for each in identities}


# ── what goes ───────────────────────────────────────────────────────────────────────────────


def test_the_inbox_forgets_what_is_older_than_its_retention_and_nothing_else(
    database: Database, housekeeping: Housekeeping
) -> None:
    _, young, new = handle(database, INBOX + 5, INBOX - 60, 0)

    assert housekeeping.finish()["inbox"] == 1
    assert remembered(database) == ids(young, new)


def test_counts_of_redeliveries_that_had_no_outcome_go_with_the_inbox(
    database: Database, housekeeping: Housekeeping, attempts: Attempts
) -> None:
    old, young = Identity.fresh(), Identity.fresh()
    with database.engine.begin() as connection:
        for each in (old, young):
            attempts.count(connection, CONSUMER, each)
    age(database, attempts.table, INBOX + 5, attempts.table.c.message_id == old.id)
    age(database, attempts.table, INBOX - 60, attempts.table.c.message_id == young.id)

    assert housekeeping.finish()["attempts"] == 1
    with database.engine.begin() as connection:
        assert attempts.count(connection, CONSUMER, young) == 2


def test_dead_letters_go_when_they_were_dealt_with_long_ago_and_open_ones_never(
    database: Database, housekeeping: Housekeeping, dead_letters: DeadLetterStore
) -> None:
    bury(database, dead_letters, message(), LETTERS + 5, "skipped")
    keep = [
        bury(database, dead_letters, message(), LETTERS - 60, "skipped"),
        bury(database, dead_letters, message(), 10 * LETTERS, "open"),
    ]
    just_redriven = bury(database, dead_letters, message(), 2 * LETTERS, "redriven")
    note(database, just_redriven, LETTERS - 60)
    redriven_long_ago = bury(database, dead_letters, message(), 2 * LETTERS, "redriven")
    note(database, redriven_long_ago, LETTERS + 60)

    assert housekeeping.finish()["dead_letters"] == 2
    with database.engine.connect() as connection:
        left = set(connection.scalars(select(dead_letters.table.c.id)))
    assert left == {*keep, just_redriven}


def test_the_audit_goes_by_age_but_not_before_the_letter_that_it_is_about(
    database: Database, housekeeping: Housekeeping, dead_letters: DeadLetterStore
) -> None:
    letter = bury(database, dead_letters, message(), AUDIT + 60, "open")
    note(database, letter, AUDIT + 5)
    note(database, letter + 1, AUDIT + 5)
    note(database, None, AUDIT + 5)
    note(database, letter + 1, AUDIT - 60)

    assert housekeeping.finish()["audit"] == 2
    with database.engine.connect() as connection:
        left = connection.scalars(select(database.tables.audit.c.dead_letter)).all()
    assert sorted(left) == [letter, letter + 1]


def test_nothing_goes_where_the_settings_say_for_ever(
    database: Database, outbox: OutboxStore, cursors: Cursors, dead_letters: DeadLetterStore
) -> None:
    kinds = ("inbox", "dead_letter", "request", "audit", "saga")
    for_ever = {f"{name}_retention": None for name in kinds}
    handle(database, 100 * INBOX)
    bury(database, dead_letters, message(), 100 * INBOX, "skipped")
    note(database, None, 100 * INBOX)

    assert make(database, outbox, cursors, **for_ever).finish() == {"released": 0}
    assert count(database, database.tables.inbox) == 1


def test_the_longest_retention_is_longer_than_any_calendar(
    database: Database, outbox: OutboxStore, cursors: Cursors
) -> None:
    handle(database, INBOX)

    assert make(database, outbox, cursors, inbox_retention=1e15).finish()["inbox"] == 0


# ── what is kept ────────────────────────────────────────────────────────────────────────────


def test_the_inbox_remembers_messages_that_are_still_somewhere_here(
    database: Database,
    housekeeping: Housekeeping,
    outbox: OutboxStore,
    cursors: Cursors,
    dead_letters: DeadLetterStore,
) -> None:
    dead, closed, parked, waiting, _ = handle(database, *[INBOX + 5] * 5)
    bury(database, dead_letters, message(identity=dead.next), 0, "open")
    bury(database, dead_letters, message(identity=closed), 0, "redriven")
    with database.engine.begin() as connection:
        outbox.add(connection, [message(identity=waiting)])
        assert cursors.park(
            connection, CONSUMER, Position(LANE, 1, 2), message(identity=parked.next)
        )
    age(database, outbox.table, INBOX + 10, column="created_at")

    assert housekeeping.finish()["inbox"] == 1
    assert remembered(database) == ids(dead, closed, parked, waiting)


def test_a_copy_that_comes_within_the_retention_is_absorbed_and_a_later_one_is_not(
    database: Database, housekeeping: Housekeeping, inbox: InboxStore
) -> None:
    (identity,) = handle(database, INBOX - 60)
    housekeeping.finish()
    with database.engine.begin() as connection:
        within = inbox.admit(connection, CONSUMER, identity)
    age(database, inbox.table, INBOX + 5)
    housekeeping.finish()
    with database.engine.begin() as connection:
        after = inbox.admit(connection, CONSUMER, identity)

    assert within == RecordedOutcome(Outcome.done, None)
    assert after is None


# ── in batches ──────────────────────────────────────────────────────────────────────────────


def test_each_transaction_deletes_a_batch_of_the_oldest(
    database: Database, housekeeping: Housekeeping
) -> None:
    table = database.tables.inbox
    old = ids(*handle(database, *[0.0] * (BATCH + 7)))
    age(database, table, 2 * INBOX)
    handle(database, *[0.0] * BATCH)
    age(database, table, 3 * INBOX, table.c.message_id.not_in(old))
    batches = (each for each in housekeeping.batches() if each.what == "inbox")

    assert next(batches).rows == BATCH
    assert remembered(database) == old
    assert [each.rows for each in batches] == [BATCH, 7]
    assert remembered(database) == set()


def test_what_is_kept_does_not_stop_what_is_behind_it(
    database: Database, housekeeping: Housekeeping, dead_letters: DeadLetterStore
) -> None:
    table = database.tables.inbox
    kept = handle(database, *[0.0] * (BATCH + 1))
    with database.engine.begin() as connection:
        for each in kept:
            dead_letters.add(
                connection, message(identity=each), Reason.failed, error="", attempts=1
            )
    age(database, table, 2 * INBOX)
    handle(database, *[INBOX + 5] * 3)

    assert housekeeping.finish()["inbox"] == 3
    assert remembered(database) == ids(*kept)


def test_several_at_once_share_the_work(
    database: Database, outbox: OutboxStore, cursors: Cursors
) -> None:
    total = 6 * BATCH + 1
    handle(database, *[0.0] * total)
    age(database, database.tables.inbox, 2 * INBOX)

    def clean(_: int) -> int:
        return make(database, outbox, cursors).finish()["inbox"]

    with ThreadPoolExecutor(4) as workers:
        deleted = list(workers.map(clean, range(4)))

    assert sum(deleted) == total
    assert remembered(database) == set()


@only_locking
def test_a_message_in_progress_and_a_purge_do_not_wait_for_each_other(
    database: Database, housekeeping: Housekeeping, inbox: InboxStore
) -> None:
    handle(database, *[INBOX + 5] * 3)
    table = database.tables.inbox
    began = time.monotonic()
    with database.engine.connect() as handler, database.engine.connect() as purger:
        inbox.admit(handler, CONSUMER, Identity.fresh())
        purged = database.dialect.purge(purger, table, table.c.outcome == "done", BATCH)
        inbox.admit(handler, CONSUMER, Identity.fresh())
        housekeeping.finish()  # passes over what the first purger has locked
        handler.commit()
        purger.commit()

    assert time.monotonic() - began < 30
    assert purged == 3
    assert count(database, table) == 2


@pytest.mark.parametrize("rows", [1, 3 * BATCH])
def test_a_purge_reads_an_index(database: Database, housekeeping: Housekeeping, rows: int) -> None:
    """Else each round would read tables of millions of rows to find nothing."""
    if database.vendor == "sqlite":
        pytest.skip("it has no statistics to be misled by")
    handle(database, *[0.0] * rows)
    known = {each.what: each for each in housekeeping.chores if isinstance(each, Retention)}
    rules = [known[what] for what in ("inbox", "dead_letters", "audit")]
    with database.engine.connect() as connection:
        before = ago(connection, database.dialect, 0)
        for rule in rules:
            table = rule.table
            old = (table.c.at < before) & rule.unneeded(before)
            query = database.dialect._oldest(table, old, BATCH).compile(
                connection, compile_kwargs={"literal_binds": False}
            )
            if database.vendor == "postgresql":
                connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            plan = connection.exec_driver_sql(f"EXPLAIN {query}", query.params)
            text = " ".join(str(each) for row in plan for each in row)

            assert f"{table.name}_at" in text


# ── what was left lying ─────────────────────────────────────────────────────────────────────


def release_and_lose(database: Database, cursors: Cursors) -> Message:
    """A parked message whose turn has come, and whose row in the outbox is gone."""
    parked = message()
    with database.engine.begin() as connection:
        assert cursors.park(connection, CONSUMER, Position(LANE, 1, 2), parked)
        cursor = cursors.find(connection, CONSUMER, LANE)
        released = cursors.advance(connection, CONSUMER, Position(LANE, 1, 1), cursor)
        assert released is not None
        connection.execute(delete(database.tables.outbox))
    return parked


def test_a_parked_message_whose_release_was_lost_is_sent_again_in_time_and_once(
    database: Database, housekeeping: Housekeeping, outbox: OutboxStore, cursors: Cursors
) -> None:
    parked = release_and_lose(database, cursors)

    too_early = housekeeping.finish()["released"]
    age(database, cursors.parked, SETTINGS.transaction_timeout + 5, column="released_at")
    in_time = housekeeping.finish()["released"]
    again = housekeeping.finish()["released"]

    assert (too_early, in_time, again) == (0, 1, 0)
    with database.engine.begin() as connection:
        (pending,) = outbox.claim(connection, "relay", 10)
    assert pending.message == parked


def test_a_release_that_cannot_be_written_is_as_if_it_had_not_been_tried(
    database: Database,
    housekeeping: Housekeeping,
    cursors: Cursors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release_and_lose(database, cursors)
    age(database, cursors.parked, SETTINGS.transaction_timeout + 5, column="released_at")

    def fail(*_: object) -> None:
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(OutboxStore, "add", fail)
        with pytest.raises(ConnectionError):
            housekeeping.finish()

    assert housekeeping.finish()["released"] == 1


def test_what_waits_behind_a_failed_message_stays_where_it_is(
    database: Database, housekeeping: Housekeeping, cursors: Cursors
) -> None:
    with database.engine.begin() as connection:
        cursors.park(connection, CONSUMER, Position(LANE, 1, 2), message())
        assert cursors.find(connection, CONSUMER, LANE) == Cursor(parked=1, oldest=1, written=True)

    assert housekeeping.finish()["released"] == 0


def test_sagas_go_when_they_have_been_over_for_long_with_all_that_belongs_to_them(
    database: Database, housekeeping: Housekeeping
) -> None:
    log, table = sagas_of(database), database.tables.sagas
    with database.engine.begin() as connection:
        for id_, state, root in (
            ("over", State.compensated, None),
            ("over/part", State.completed, "over"),
            ("running", State.running, None),
            ("running/part", State.completed, "running"),
            ("parked", State.parked, None),
            ("fresh", State.completed, None),
        ):
            saga = SagaInstance(id_, "order", 1, state, {}, root=root)
            log.add(connection, saga)
            log.save(connection, saga)
            log.begin(connection, id_, Record(Kind.step, "pay"))
    age(database, table, 91 * DAY, table.c.id != "fresh", column="changed_at")

    assert housekeeping.finish()["sagas"] == 1

    with database.engine.connect() as connection:
        left = set(connection.scalars(select(table.c.id)))
        of = set(connection.scalars(select(database.tables.saga_steps.c.saga)))
    assert left == of == {"running", "running/part", "parked", "fresh"}
