"""The state of a stream, folded from its beginning or from a snapshot, on every database."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from celery_eda import EDA, Event
from celery_eda.errors import ArchivedEvents, InvalidEvent
from celery_eda.events import fold
from tests.support.databases import Database


@pytest.fixture
def eda(database: Database, monkeypatch: pytest.MonkeyPatch) -> EDA:
    monkeypatch.setattr(fold, "EVERY", 5)
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.update(eda_send_after_commit=False, eda_service="shop")
    return EDA(app, engine=database.engine)


def emit(eda: EDA, *numbers: int) -> None:
    for number in numbers:
        eda.emit("count.raised", {"by": number}, key="a")


def add(total: int, event: Event) -> int:
    return total + int(event.data["by"])


def moments(eda: EDA) -> list[datetime]:
    """When each event was appended."""
    with eda.databases.engine.connect() as connection:
        return [
            each.recorded or datetime.max for each in eda.events.store.stream(connection, "count.a")
        ]


def snapshots(eda: EDA) -> list[tuple[int, str]]:
    table = eda.databases.tables.snapshots
    with eda.databases.engine.connect() as connection:
        found = connection.execute(select(table.c.version, table.c.state).order_by(table.c.version))
        return [tuple(row) for row in found]


def forget(eda: EDA, *versions: int) -> None:
    events = eda.databases.tables.events
    with eda.databases.engine.begin() as connection:
        connection.execute(delete(events).where(events.c.version.in_(versions)))


def test_a_state_is_the_fold_of_the_stream_at_any_time(eda: EDA) -> None:
    emit(eda, 1, 2, 4)

    assert eda.fold("count.a", 0, add) == 7
    assert [eda.fold("count.a", 0, add, at=at) for at in moments(eda)] == [1, 3, 7]
    assert eda.fold("count.a", 0, add, at=datetime(2020, 1, 1, tzinfo=timezone.utc)) == 0
    assert eda.fold("count.b", 0, add) == 0


def test_it_is_read_in_the_transaction_that_is_given(eda: EDA) -> None:
    emit(eda, 1)
    with Session(eda.databases.engine) as session:
        events = eda.databases.tables.events
        session.execute(update(events).values(data='{"by": 5}'))

        assert eda.fold("count.a", 0, add, session=session) == 5
        assert eda.fold("count.a", 0, add, session=session.connection()) == 5
        session.rollback()


def test_a_snapshot_is_made_now_and_then_and_begun_with(eda: EDA) -> None:
    emit(eda, 1, 1, 1, 1)
    assert eda.fold("count.a", 0, add, snapshot="total") == 4
    assert snapshots(eda) == []
    emit(eda, 1, 1)
    assert eda.fold("count.a", 0, add, snapshot="total") == 6
    assert snapshots(eda) == [(6, "6")]
    emit(eda, 1)
    with eda.databases.engine.begin() as connection:  # what is behind it is not read again
        connection.execute(
            update(eda.databases.tables.events)
            .where(eda.databases.tables.events.c.version == 1)
            .values(data="null")
        )

    assert eda.fold("count.a", 0, add, snapshot="total") == 7
    assert eda.fold("count.a", 0, add, snapshot="total", at=moments(eda)[5]) == 6
    with pytest.raises(TypeError):
        eda.fold("count.a", 0, add, snapshot="another name")
    with pytest.raises(TypeError):
        eda.fold("count.a", 0, add, snapshot="total", at=moments(eda)[4])


def test_a_snapshot_of_the_past_is_as_good(eda: EDA) -> None:
    emit(eda, *range(12))
    at = moments(eda)[7]

    assert eda.fold("count.a", 0, add, snapshot="total", at=at) == sum(range(8))
    assert eda.fold("count.a", 0, add, snapshot="total") == sum(range(12))
    assert [version for version, _ in snapshots(eda)] == [8]


def test_what_is_not_the_same_as_json_is_no_snapshot(eda: EDA) -> None:
    emit(eda, *range(5))

    def collect(state: Any, event: Event) -> Any:
        return {*state, event.data["by"]}

    assert eda.fold("count.a", set(), collect) == set(range(5))
    with pytest.raises(InvalidEvent, match="changes when written as JSON"):
        eda.fold("count.a", frozenset(), lambda state, _: (1, 2), snapshot="pair")
    with eda.databases.engine.connect() as connection:
        assert (
            connection.scalar(select(func.count()).select_from(eda.databases.tables.snapshots)) == 0
        )


@pytest.mark.parametrize("gone", [(1,), (1, 2), (1, 2, 3)])
def test_without_its_beginning_a_stream_has_no_state(eda: EDA, gone: tuple[int, ...]) -> None:
    emit(eda, 1, 2, 4)
    last = moments(eda)[-1]
    forget(eda, *gone)

    for at in (None, last):
        with pytest.raises(ArchivedEvents, match=r"Event 1 of count\.a"):
            eda.fold("count.a", 0, add, at=at)


def test_from_a_snapshot_a_stream_without_its_beginning_has_its_state(eda: EDA) -> None:
    emit(eda, *[1] * 6)
    eda.fold("count.a", 0, add, snapshot="total")
    emit(eda, 1)
    forget(eda, 1, 2, 3, 4, 5, 6)
    assert eda.fold("count.a", 0, add, snapshot="total") == 7

    forget(eda, 7)
    with pytest.raises(ArchivedEvents, match=r"Event 7 of count\.a"):
        eda.fold("count.a", 0, add, snapshot="total")


def test_two_who_make_the_same_snapshot_make_one(eda: EDA) -> None:
    emit(eda, *[1] * 5)
    eda.fold("count.a", 0, add, snapshot="total")
    table = eda.databases.tables.snapshots
    with eda.databases.engine.begin() as connection:
        row = connection.execute(select(table)).mappings().one()
        connection.execute(delete(table))
    with eda.databases.engine.begin() as connection:
        begun = Session(connection)
        connection.execute(insert(table).values(**row))
        assert eda.fold("count.a", 0, add, snapshot="total", session=begun) == 5

    assert len(snapshots(eda)) == 1
