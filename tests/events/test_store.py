"""The event store on every database: streams, versions, and positions that skip nobody."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, select

from celery_eda.core.event import Event, EventAppend
from celery_eda.core.identity import Lane
from celery_eda.errors import InvalidEvent, VersionConflict
from celery_eda.events.store import EventFilter, EventStore
from celery_eda.ordering.sequences import Sequences
from tests.support.databases import Database
from tests.support.messages import message

NOW = datetime(2026, 5, 17, 12, 30, 15, 250000, tzinfo=timezone.utc)


@pytest.fixture
def store(database: Database) -> EventStore:
    return EventStore(database.tables.events, database.dialect)


def event(name: str = "order.placed", key: str | None = "7", data: Any = None) -> Event:
    return Event(uuid4(), name, "shop", NOW, data, key)


def append(
    store: EventStore, connection: Connection, *events: Event, expected: int | None = None
) -> None:
    """What the outbox's flush does: numbers first, then the events."""
    sequences = Sequences(_sequences_of(connection, store), store.dialect)
    messages = [
        replace(
            message(lane=Lane("shop", f"{each.category}.#", each.key) if each.key else None),
            event_append=EventAppend(each, expected),
        )
        for each in events
    ]
    drafts = [
        each.event_append for each in sequences.number(connection, messages) if each.event_append
    ]
    store.append(connection, drafts)


def _sequences_of(connection: Connection, store: EventStore) -> Any:
    return store.table.metadata.tables["eda_sequences"]


def types(events: Sequence[Event]) -> list[str]:
    return [each.type for each in events]


def version_of(store: EventStore, connection: Connection, stream: str) -> int:
    """The version of the last event of *stream*; 0 if there is none."""
    return max((each.version or 0 for each in store.stream(connection, stream)), default=0)


def positions(store: EventStore, database: Database) -> list[tuple[int | None, str]]:
    """The positions and types of all events that have one."""
    store.assign_positions(database.engine)
    with database.engine.connect() as connection:
        return [(each.position, each.type) for each in store.read(connection)]


# ── streams ─────────────────────────────────────────────────────────────────────────────────


def test_an_event_is_read_as_it_was_appended(database: Database, store: EventStore) -> None:
    data = {"text": "a\u2028\U0001f600'\\", "amount": 1.5, "lines": [1, None, {"deep": True}]}
    given = replace(
        event(data=data), data_version=3, correlation_id="from here", causation_id=str(uuid4())
    )

    with database.engine.begin() as connection:
        append(store, connection, given)

    with database.engine.connect() as connection:
        (found,) = store.stream(connection, "order.7")
        assert store.find(connection, given.id) == found
        assert store.find(connection, uuid4()) is None
    assert found.recorded is not None
    assert replace(found, order=None, recorded=None) == replace(given, version=1)
    assert found.order
    assert found.order[1:3] == ("order.#", "7")


def test_the_events_of_a_stream_count_from_one_across_their_types(
    database: Database, store: EventStore
) -> None:
    with database.engine.begin() as connection:
        append(store, connection, event("order.placed"), event("order.paid"), event(key="8"))
    with database.engine.begin() as connection:
        append(store, connection, event("order.made"), event("stock.taken"))

    with database.engine.connect() as connection:
        order = [(each.version, each.type) for each in store.stream(connection, "order.7")]
        assert order == [(1, "order.placed"), (2, "order.paid"), (3, "order.made")]
        assert version_of(store, connection, "order.7") == 3
        assert version_of(store, connection, "stock.7") == 1
        assert version_of(store, connection, "order.9") == 0
        assert types(list(store.stream(connection, "order.7", after=2))) == ["order.made"]


def test_keys_that_differ_in_case_blanks_or_unicode_form_are_streams_apart(
    database: Database, store: EventStore
) -> None:
    keys = ["a", "A", "a ", "é", "e\u0301", "a.b"]

    with database.engine.begin() as connection:
        append(store, connection, *(event(key=key) for key in keys))

    with database.engine.connect() as connection:
        assert [version_of(store, connection, f"order.{key}") for key in keys] == [1] * len(keys)


def test_an_event_without_a_key_belongs_to_no_stream(database: Database, store: EventStore) -> None:
    with database.engine.begin() as connection:
        append(store, connection, event("shop.opened", key=None), event("shop.closed", key=None))

    assert positions(store, database) == [(1, "shop.opened"), (2, "shop.closed")]


def test_an_expected_version_that_is_there_is_accepted(
    database: Database, store: EventStore
) -> None:
    with database.engine.begin() as connection:
        append(store, connection, event(), expected=0)
    with database.engine.begin() as connection:
        append(store, connection, event("order.paid"), expected=1)

    with database.engine.connect() as connection:
        assert version_of(store, connection, "order.7") == 2


def test_an_expected_version_that_has_passed_is_a_loud_conflict(
    database: Database, store: EventStore
) -> None:
    with database.engine.begin() as connection:
        append(store, connection, event(), event("order.paid"))

    with (
        pytest.raises(VersionConflict, match=r"order\.7 is at version 2, not 1"),
        database.engine.begin() as connection,
    ):
        append(store, connection, event("order.paid"), expected=1)

    with database.engine.connect() as connection:
        assert version_of(store, connection, "order.7") == 2


def test_of_sixteen_who_append_to_one_stream_each_gets_a_version_or_a_conflict(
    database: Database, store: EventStore
) -> None:
    conflicts = 0
    lock = threading.Lock()

    def append_ten(_: int) -> None:
        nonlocal conflicts
        with database.engine.connect() as connection:
            for number in range(10):
                version = version_of(store, connection, "order.7")
                connection.rollback()
                time.sleep(0.001)  # between reading and deciding
                try:
                    append(store, connection, event(data=number), expected=version)
                except VersionConflict:
                    connection.rollback()
                    with lock:
                        conflicts += 1
                    continue
                connection.commit()

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(append_ten, range(16)))

    with database.engine.connect() as connection:
        versions = [each.version for each in store.stream(connection, "order.7")]
    assert versions == list(range(1, 160 - conflicts + 1))
    assert conflicts > 0, "nobody was in another's way"


def test_what_is_no_stream_is_refused(database: Database, store: EventStore) -> None:
    with (
        database.engine.connect() as connection,
        pytest.raises(InvalidEvent, match=r"<category>\.<key>"),
    ):
        list(store.stream(connection, "order"))


def test_a_long_stream_is_read_to_its_end(
    database: Database, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery_eda.events.store.BATCH", 10)
    with database.engine.begin() as connection:
        append(store, connection, *(event(data=number) for number in range(35)))

    with database.engine.connect() as connection:
        assert [each.data for each in store.stream(connection, "order.7")] == list(range(35))
    assert [position for position, _ in positions(store, database)] == list(range(1, 36))


# ── then and now ────────────────────────────────────────────────────────────────────────────


def test_the_state_at_any_time_is_the_fold_of_what_was_appended_by_then(
    database: Database, store: EventStore
) -> None:
    moments = []
    for amount in (5, 7, -3):
        with database.engine.begin() as connection:
            append(store, connection, event(data=amount))
        time.sleep(0.02)  # clocks may count in milliseconds
        with database.engine.connect() as connection:
            moments.append(connection.scalar(select(database.dialect.now())))
        time.sleep(0.02)

    def total(at: datetime | None) -> int:
        with database.engine.connect() as connection:
            events = store.stream(connection, "order.7", at=at)
            return sum(each.data for each in events)

    assert [total(at) for at in moments] == [5, 12, 9]
    assert total(moments[0] - timedelta(hours=1)) == 0
    assert total(None) == 9


def test_events_are_chosen_by_stream_category_type_and_time(
    database: Database, store: EventStore
) -> None:
    with database.engine.begin() as connection:
        append(store, connection, event("order.placed"), event("order.paid", key="8"))
    time.sleep(0.02)
    with database.engine.connect() as connection:
        between = connection.scalar(select(database.dialect.now()))
    time.sleep(0.02)
    with database.engine.begin() as connection:
        append(store, connection, event("orderly.left"), event("order.placed", key="8"))
    store.assign_positions(database.engine)

    def chosen(**choice: Any) -> list[int | None]:
        with database.engine.connect() as connection:
            return [each.position for each in store.read(connection, EventFilter(**choice))]

    assert chosen() == [1, 2, 3, 4]
    assert chosen(category="order") == [1, 2, 4]
    assert chosen(stream="order.8") == [2, 4]
    assert chosen(types=["order.paid", "orderly.left"]) == [2, 3]
    assert chosen(since=between) == [3, 4]
    assert chosen(until=between) == [1, 2]
    assert chosen(category="order", types=["order.placed"], since=between) == [4]


# ── positions ───────────────────────────────────────────────────────────────────────────────


def test_whoever_commits_late_gets_a_later_position_and_is_not_skipped(
    database: Database, store: EventStore
) -> None:
    """The row with the lower id is committed last, when a reader has passed its neighbours."""
    if database.vendor == "sqlite":
        pytest.skip("it has one writer: nobody else can append meanwhile")
    with database.engine.connect() as late:
        append(store, late, event("order.late", key="1"))
        with database.engine.begin() as connection:
            append(store, connection, event("order.early", key="2"))

        assert positions(store, database) == [(1, "order.early")]
        late.commit()

    with database.engine.connect() as connection:
        ids = dict(connection.execute(select(store.table.c.type, store.table.c.id)).all())  # type: ignore[arg-type]
    assert ids["order.late"] < ids["order.early"]
    assert positions(store, database) == [(1, "order.early"), (2, "order.late")]


def test_what_is_rolled_back_leaves_no_gap(database: Database, store: EventStore) -> None:
    for name, end in (("order.a", "commit"), ("order.b", "rollback"), ("order.c", "commit")):
        with database.engine.connect() as connection:
            append(store, connection, event(name))
            getattr(connection, end)()

    assert positions(store, database) == [(1, "order.a"), (2, "order.c")]
    with database.engine.connect() as connection:
        assert [each.version for each in store.stream(connection, "order.7")] == [1, 2]


@pytest.mark.parametrize("seconds", [0, pytest.param(30, marks=pytest.mark.soak)])
def test_readers_that_follow_while_many_append_see_each_event_once_and_streams_in_order(
    database: Database, store: EventStore, seconds: float
) -> None:
    """Four append, some slowly, every fifth in vain; three follow the positions meanwhile.

    One more has appended first, and commits *seconds* after all others.
    """
    appended: list[Any] = []
    done = threading.Event()

    def append_some(seed: int) -> None:
        chance = random.Random(seed)
        with database.engine.connect() as connection:
            for number in range(25):
                append(store, connection, event(key=f"{chance.randint(1, 3)}", data=[seed, number]))
                time.sleep(chance.choice([0, 0, 0.001, 0.02]))
                if chance.random() < 0.2:
                    connection.rollback()
                else:
                    connection.commit()
                    appended.append([seed, number])

    def follow(_: int) -> list[Event]:
        seen: list[Event] = []
        while True:
            last_look = done.is_set()
            store.assign_positions(database.engine)
            with database.engine.connect() as connection:
                after = seen[-1].position if seen else 0
                assert after is not None
                fresh = store.read(connection, after=after, limit=7)
            seen += fresh
            if last_look and not fresh:
                return seen

    with ThreadPoolExecutor(7) as threads, database.engine.connect() as late:
        if database.vendor != "sqlite":  # which has one writer
            # A key that no earlier test has deleted: InnoDB locks what is around such a row.
            append(store, late, event(key=f"late{seconds}", data=[99, 0]))
        followers = [threads.submit(follow, number) for number in range(3)]
        list(threads.map(append_some, range(4)))
        time.sleep(seconds)
        if late.in_transaction():
            late.commit()
            appended.append([99, 0])
        done.set()
        logs = [each.result() for each in followers]

    for log in logs:
        assert [each.position for each in log] == list(range(1, len(appended) + 1))
        assert sorted(each.data for each in log) == sorted(appended)
        for key in "123":
            versions = [each.version for each in log if each.key == key]
            assert versions == list(range(1, len(versions) + 1))
