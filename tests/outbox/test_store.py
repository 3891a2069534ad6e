from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.exc import DBAPIError

from celery_eda.core.identity import Identity
from celery_eda.core.message import Message
from celery_eda.databases import message_rows
from celery_eda.outbox.store import OutboxStore
from tests.support.databases import LOCKING, Database
from tests.support.messages import message
from tests.support.waiting import eventually

ANALYZE = {"postgresql": "ANALYZE eda_outbox", "mariadb": "ANALYZE TABLE eda_outbox"}
only_locking = pytest.mark.parametrize("database", LOCKING, indirect=True)
only_leasing = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


def written(database: Database, outbox: OutboxStore, *messages: Message) -> list[int]:
    """The ids of the rows of *messages*, committed."""
    with database.engine.begin() as connection:
        return outbox.add(connection, messages)


def claimable(database: Database, outbox: OutboxStore, ids: Sequence[int] = ()) -> list[int]:
    """The ids that somebody else could claim right now."""
    with database.engine.connect() as connection:
        claimed = [each.id for each in outbox.claim(connection, "somebody else", 1000, ids)]
        outbox.release(connection, "somebody else", claimed)
        connection.commit()
        return claimed


def rows(database: Database, outbox: OutboxStore) -> Any:
    with database.engine.connect() as connection:
        return connection.execute(select(outbox.table).order_by(outbox.table.c.id)).all()


def fields_of(message: Message) -> dict[str, Any]:
    return {each.name: getattr(message, each.name) for each in fields(message) if each.compare}


def in_seconds(seconds: float) -> datetime:
    return datetime.now(timezone.utc) + timedelta(seconds=seconds)


# ── envelopes ───────────────────────────────────────────────────────────────────────────────────


def test_a_message_with_an_envelope_comes_back_with_it_and_is_otherwise_the_same(
    database: Database, outbox: OutboxStore
) -> None:
    sealing = replace(outbox, seal=lambda each: each.task.encode() if "7" in each.task else None)
    messages = [message(task=f"task {n}") for n in (6, 7)]
    written(database, sealing, *messages)

    with database.engine.connect() as connection:
        claimed = [each.message for each in sealing.claim(connection, "me", 10)]
        whole = [fields_of(each.whole()) for each in claimed]
        revised = claimed[1].whole().revised(task="other")

    assert [each.envelope for each in claimed] == [None, b"task 7"]
    assert whole == list(map(fields_of, messages))
    assert revised.headers == messages[1].revised(task="other").headers


def test_of_a_message_with_an_envelope_the_rest_is_read_when_it_is_asked_for_and_once(
    database: Database, outbox: OutboxStore
) -> None:
    sealing = replace(outbox, seal=lambda _: b"envelope")
    written(database, sealing, message())
    statements: list[str] = []

    with database.engine.connect() as connection:
        ((claimed),) = [each.message for each in sealing.claim(connection, "me", 10)]
        event.listen(connection, "before_cursor_execute", lambda *a: statements.append(a[2]))
        sent = (claimed.identity, claimed.exchange, claimed.routing_key, claimed.queue)
        sent = (*sent, claimed.body, claimed.envelope, claimed.task, repr(claimed))
        before = len(statements)
        whole = claimed.whole()
        assert all((whole.headers, whole.properties, whole.content_type))

    assert before == 0, sent
    assert len(statements) == 1


def test_what_has_no_envelope_is_read_at_once_for_all(
    database: Database, outbox: OutboxStore
) -> None:
    sealing = replace(outbox, seal=lambda _: None)
    messages = [message(task=f"task {n}") for n in range(9)]
    written(database, sealing, *messages)
    statements: list[str] = []

    with database.engine.connect() as connection:
        event.listen(connection, "before_cursor_execute", lambda *a: statements.append(a[2]))
        claimed = [each.message for each in sealing.claim(connection, "me", 10)]
        read = len(statements)
        assert [fields_of(each.whole()) for each in claimed] == list(map(fields_of, messages))

    assert len(statements) == read
    assert read < len(messages)


def test_what_is_asked_for_when_the_row_is_gone_is_an_error(
    database: Database, outbox: OutboxStore
) -> None:
    sealing = replace(outbox, seal=lambda _: b"envelope")
    written(database, sealing, message())

    with database.engine.connect() as connection:
        (pending,) = sealing.claim(connection, "me", 10)
        sealing.clear(connection, "me", [pending.id])

        with pytest.raises(LookupError, match="no longer in the outbox"):
            pending.message.whole()
        with pytest.raises(AttributeError):
            pending.message.nothing  # type: ignore[attr-defined]  # noqa: B018


# ── add ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("delayed", ["none", "some", "all"])
def test_rows_are_written_in_the_order_of_the_messages(
    database: Database, outbox: OutboxStore, delayed: str
) -> None:
    late = {"none": (), "some": (3, 700), "all": range(1000)}[delayed]
    messages = [
        message(task=f"task {n}", due=in_seconds(-1) if n in late else None) for n in range(1000)
    ]

    ids = written(database, outbox, *messages)

    assert ids == sorted(ids)
    assert len(set(ids)) == 1000
    assert [(row.id, row.task) for row in rows(database, outbox)] == [
        (id, each.task) for id, each in zip(ids, messages, strict=True)
    ]


HARD_TO_KEEP: dict[str, dict[str, Any]] = {
    "plain": {},
    "names beyond ASCII": {"queue": "münzen", "exchange": "kasse", "routing_key": "a.b.*"},
    "every byte, 256 KB": {"body": bytes(range(256)) * 1024},
    "a NUL": {"body": b"\0", "content_encoding": "binary"},
    "an empty body": {"body": b""},
    "odd text in headers": {"headers": {"emoji": "🍫☕", "nul": "a\0b", "surrogate": "\ud800"}},
    "typed headers": {
        "headers": {"at": datetime(2026, 5, 17, 8, 30, tzinfo=timezone.utc), "id": UUID(int=7)}
    },
    "a dictionary like kombu's for a type": {
        "headers": {"of ours": {"__type__": "cup", "__value__": 1}}
    },
    "a dictionary like kombu's for a date": {
        "headers": {"of ours": {"__type__": "datetime", "__value__": "tomorrow"}}
    },
    "100 KB of headers": {"headers": {"long": "x" * 100_000}},
    "properties": {"properties": {"priority": 9, "expiration": "5000", "reply_to": "ü"}},
    "the highest id and revision": {"identity": Identity(UUID(int=2**128 - 1), 2**31 - 1)},
    "prerequisites": {"prerequisites": (("set_chord_size", {"size": 3}),)},
}


@pytest.mark.parametrize("changes", HARD_TO_KEEP.values(), ids=HARD_TO_KEEP)
def test_a_message_is_read_as_it_was_written(
    database: Database, outbox: OutboxStore, changes: dict[str, Any]
) -> None:
    original = message(**changes)
    written(database, outbox, original)

    with database.engine.connect() as connection:
        (pending,) = outbox.claim(connection, "me", 10)

    assert pending.message == original


def test_rows_of_a_rolled_back_transaction_are_never_claimed(
    database: Database, outbox: OutboxStore
) -> None:
    with database.engine.connect() as connection:
        outbox.add(connection, [message()])
        connection.rollback()

    assert claimable(database, outbox) == []


# ── claim ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("due", [None, -1], ids=["ready", "came due"])
@pytest.mark.parametrize("number", [10, 1000])
def test_a_claim_takes_what_another_one_left_and_nothing_else(
    database: Database, outbox: OutboxStore, number: int, due: float | None
) -> None:
    waiting = message(due=in_seconds(due)) if due else message()
    ids = written(database, outbox, *[waiting] * number)

    with database.engine.connect() as one, database.engine.connect() as other:
        first = [each.id for each in outbox.claim(one, "one", 4)]
        second = [each.id for each in outbox.claim(other, "other", 2 * number)]

    assert 0 < len(first) <= 4
    assert first + second == ids


def test_rows_are_claimed_when_they_are_due(database: Database, outbox: OutboxStore) -> None:
    now, past, later = written(
        database, outbox, message(), message(due=in_seconds(-60)), message(due=in_seconds(60))
    )

    assert sorted(claimable(database, outbox)) == [now, past]
    assert claimable(database, outbox, [later]) == []


@pytest.mark.parametrize("error", [timedelta(hours=1), timedelta(hours=-1)], ids=["fast", "slow"])
def test_a_producer_whose_clock_is_wrong_sets_the_right_delay(
    database: Database, outbox: OutboxStore, monkeypatch: pytest.MonkeyPatch, error: timedelta
) -> None:
    class WrongClock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + error

    monkeypatch.setattr(message_rows, "datetime", WrongClock)
    written(database, outbox, message(due=in_seconds(2) + error))

    early = claimable(database, outbox)
    time.sleep(2.2)  # until it is due, by the database's clock

    assert (len(early), len(claimable(database, outbox))) == (0, 1)


def test_a_claim_of_ids_looks_at_no_other_rows(database: Database, outbox: OutboxStore) -> None:
    ids = written(database, outbox, *(message() for _ in range(5)))

    assert claimable(database, outbox, [ids[3], ids[1]]) == [ids[1], ids[3]]


def test_ids_that_are_gone_or_claimed_are_passed_over(
    database: Database, outbox: OutboxStore
) -> None:
    mine, free = written(database, outbox, message(), message())

    with database.engine.connect() as connection:
        outbox.claim(connection, "me", 1)

        assert claimable(database, outbox, [mine, free, 10**9]) == [free]


def test_rows_are_claimed_in_the_order_of_writing(database: Database, outbox: OutboxStore) -> None:
    ids = written(database, outbox, *(message() for _ in range(20)))

    assert claimable(database, outbox) == ids


@only_locking
def test_rows_that_waited_take_no_more_than_half_of_the_room(
    database: Database, outbox: OutboxStore
) -> None:
    written(database, outbox, *(message(due=in_seconds(-1)) for _ in range(20)))
    written(database, outbox, *(message() for _ in range(20)))

    with database.engine.connect() as connection:
        claimed = outbox.claim(connection, "me", 10)
        waiting = {row.id for row in rows(database, outbox) if row.available_at}

    assert [each.id in waiting for each in claimed] == [True] * 5 + [False] * 5


@only_locking
def test_a_low_id_that_commits_after_higher_ones_were_sent_is_not_skipped(
    database: Database, outbox: OutboxStore
) -> None:
    with database.engine.connect() as slow, database.engine.connect() as relay:
        (low,) = outbox.add(slow, [message()])
        high = written(database, outbox, *(message() for _ in range(1000)))
        claimed = [each.id for each in outbox.claim(relay, "relay", 2000)]
        outbox.clear(relay, "relay", claimed)
        relay.commit()
        slow.commit()

    assert claimed == high
    assert low < high[0]
    assert claimable(database, outbox) == [low]


@only_locking
def test_a_claim_does_not_stop_producers(database: Database, outbox: OutboxStore) -> None:
    written(database, outbox, message(due=in_seconds(-1)), message(), message())

    with database.engine.connect() as relay:
        outbox.claim(relay, "relay", 10)
        started = time.monotonic()
        written(database, outbox, message(due=in_seconds(-1)), message())

    assert time.monotonic() - started < 20


# ── settle ──────────────────────────────────────────────────────────────────────────────────────


def test_cleared_rows_are_gone_and_counted(database: Database, outbox: OutboxStore) -> None:
    ids = written(database, outbox, message(), message(), message())

    with database.engine.connect() as connection:
        outbox.claim(connection, "me", 2)
        cleared = outbox.clear(connection, "me", ids[:2])
        connection.commit()

    assert cleared == 2
    assert claimable(database, outbox) == ids[2:]


def test_clearing_nothing_is_harmless(database: Database, outbox: OutboxStore) -> None:
    with database.engine.connect() as connection:
        assert outbox.clear(connection, "me", []) == 0


def test_a_refused_row_counts_its_attempts_and_rests(
    database: Database, outbox: OutboxStore
) -> None:
    (id,) = written(database, outbox, message())
    attempts = []
    for _ in range(2):
        with database.engine.connect() as connection:
            (pending,) = outbox.claim(connection, "me", 1)
            attempts.append(pending.attempts)
            outbox.postpone(connection, "me", id, 2, "queue is full 🍫")
            connection.commit()
        assert claimable(database, outbox) == []
        time.sleep(2.2)  # until its rest is over, by the database's clock

    (row,) = rows(database, outbox)
    assert (attempts, row.attempts, row.last_error) == ([0, 1], 2, "queue is full 🍫")
    assert claimable(database, outbox) == [id]


def test_a_released_row_is_as_it_was_and_free_at_once(
    database: Database, outbox: OutboxStore
) -> None:
    (id,) = written(database, outbox, message())

    with database.engine.connect() as connection:
        outbox.claim(connection, "me", 1)
        outbox.release(connection, "me", [id])
        connection.commit()

    (row,) = rows(database, outbox)
    assert (row.attempts, row.available_at, row.last_error, row.claimed_by) == (0, None, None, None)
    assert claimable(database, outbox) == [id]


# ── a claimer that dies or freezes ──────────────────────────────────────────────────────────────


@only_locking
def test_the_rows_of_a_dead_claimer_are_free_without_a_time_out(
    database: Database, outbox: OutboxStore
) -> None:
    ids = written(database, outbox, message(), message())

    with database.engine.connect() as connection:
        outbox.claim(connection, "dead", 10)
        connection.invalidate()  # closes the socket, as the end of its process does

        eventually(lambda: claimable(database, outbox) == ids, "the server notices")


@only_locking
def test_the_server_ends_the_claim_of_a_frozen_relay_and_its_late_clear_changes_nothing(
    database: Database, outbox: OutboxStore
) -> None:
    ids = written(database, outbox, message(), message())
    short = database.again(claim_timeout=3)

    with short.engine.connect() as frozen:
        outbox.claim(frozen, "frozen", 10)
        assert claimable(database, outbox) == []
        time.sleep(4)  # it is frozen for longer than eda_claim_timeout

        assert claimable(database, outbox) == ids
        with pytest.raises(DBAPIError) as refusal:
            outbox.clear(frozen, "frozen", ids)

    assert database.dialect.is_outage(refusal.value)
    assert claimable(database, outbox) == ids
    short.engine.dispose()


@only_leasing
def test_a_lease_that_ended_by_the_clock_is_taken_over_and_its_owner_s_late_words_change_nothing(
    database: Database, outbox: OutboxStore
) -> None:
    ids = written(database, outbox, message(), message())
    short = database.again(claim_timeout=3)
    leasing = OutboxStore(short.tables.outbox, short.dialect)

    with short.engine.connect() as frozen, database.engine.connect() as other:
        leasing.claim(frozen, "frozen", 10)
        assert claimable(database, outbox) == []
        time.sleep(3.2)  # the lease is over

        taken = [each.id for each in outbox.claim(other, "other", 10)]
        cleared = leasing.clear(frozen, "frozen", ids)
        leasing.postpone(frozen, "frozen", ids[0], 0, "too late")
        leasing.release(frozen, "frozen", ids)
        frozen.commit()

    assert (taken, cleared) == (ids, 0)
    assert [(row.claimed_by, row.attempts) for row in rows(database, outbox)] == [("other", 0)] * 2
    assert claimable(database, outbox) == []
    short.engine.dispose()


@only_leasing
def test_a_claim_holds_no_lock_while_messages_are_sent(
    database: Database, outbox: OutboxStore
) -> None:
    written(database, outbox, message())

    with database.engine.connect() as relay:
        outbox.claim(relay, "relay", 10)
        started = time.monotonic()
        written(database, outbox, message())

    assert time.monotonic() - started < 20


# ── cost ────────────────────────────────────────────────────────────────────────────────────────


@only_locking
@pytest.mark.parametrize("scheduled", [0, 10_000, 20_000])
def test_a_claim_reads_the_index_and_only_what_it_takes(
    database: Database, outbox: OutboxStore, scheduled: int
) -> None:
    later, now = message(due=in_seconds(3600)), message()
    written(database, outbox, *[later] * scheduled, *[now] * (20_000 - scheduled))
    statements: list[tuple[str, Any]] = []
    with database.engine.connect() as connection:
        connection.execute(text(ANALYZE[database.vendor]))
        connection.commit()
        event.listen(
            connection,
            "before_cursor_execute",
            lambda _c, _cursor, statement, parameters, *_: statements.append(
                (statement, parameters)
            ),
        )
        outbox.claim(connection, "me", 500)
        claims = statements[:]
        plans = [
            str(connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).all())
            for statement, parameters in claims
        ]

    assert len(plans) == 2
    for plan in plans:
        assert "ix_eda_outbox_available" in plan
        assert "sort" not in plan.lower()


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_the_plans_of_a_relay_are_made_for_the_rows_that_are_meant(
    database: Database, outbox: OutboxStore
) -> None:
    """One that is kept may be of a time when the table was empty, and any index as good."""
    engine = create_engine(database.engine.url)
    database.dialect.configure_relay_engine(engine)
    gone = written(database, outbox, *[message()] * 5000)
    with engine.begin() as connection:
        outbox.clear(connection, "me", gone)
    with engine.begin() as connection:
        connection.execute(text(ANALYZE["postgresql"]))
    ids = written(database, outbox, *[message()] * 5000)

    with engine.connect() as connection:
        for start in range(0, len(ids), 500):
            some = ids[start : start + 500]
            assert len(outbox.claim(connection, "me", 500, some)) == 500
            assert outbox.clear(connection, "me", some) == 500
        plans = text("SELECT generic_plans, custom_plans FROM pg_prepared_statements")
        kept, made = zip(*connection.execute(plans), strict=True)
        connection.rollback()
    engine.dispose()

    assert sum(made) > 0
    assert sum(kept) == 0


def test_the_database_s_clock_goes_on_within_a_transaction(database: Database) -> None:
    with database.engine.begin() as connection:
        first = connection.scalar(select(database.dialect.now()))
        time.sleep(0.05)
        second = connection.scalar(select(database.dialect.now()))

    assert timedelta(seconds=0.03) < second - first < timedelta(seconds=60)


@only_locking
def test_engines_of_the_road_read_what_was_committed(database: Database) -> None:
    with database.engine.connect() as connection:
        assert connection.get_isolation_level() == "READ COMMITTED"


def test_no_secret_reaches_the_last_error(database: Database, outbox: OutboxStore) -> None:
    with database.engine.begin() as connection:
        (id,) = outbox.add(connection, [message()])
    with database.engine.connect() as connection:
        outbox.claim(connection, "me", 1)
        outbox.postpone(connection, "me", id, 1, "amqp://u:hunter2@h refused\0\ud800")
        connection.commit()

        why = connection.scalar(select(outbox.table.c.last_error))

    assert why == "amqp://u:[hidden]@h refused\\0\\ud800"


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_claim_searches_the_index_for_what_is_due(database: Database) -> None:
    dialect, table = database.dialect, database.tables.outbox
    query = dialect._came_due(table).compile(
        database.engine, compile_kwargs={"literal_binds": True}
    )
    with database.engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        plan = "\n".join(connection.exec_driver_sql(f"EXPLAIN {query}").scalars())

    assert "Index Cond: (available_at <=" in plan
