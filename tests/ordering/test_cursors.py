"""Whose turn it is, what waits, and who wakes it, on every database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Connection, create_engine, select, update
from sqlalchemy.exc import OperationalError

from celery_eda.core.identity import Lane, Position
from celery_eda.core.message import Message
from celery_eda.databases.dialect import LostRace
from celery_eda.ordering.cursor import Cursor, Turn
from celery_eda.ordering.cursors import Cursors, PositionTaken
from tests.support.databases import Database
from tests.support.messages import message

LANE = Lane("shop", "charge", "account 7")
OLD, NEW = 1000, 2000


@pytest.fixture
def cursors(database: Database) -> Cursors:
    return Cursors(database.tables.cursors, database.tables.parked, database.dialect)


@pytest.fixture
def connection(database: Database) -> Iterator[Connection]:
    with database.engine.connect() as connection:
        yield connection


def at(number: int, epoch: int = OLD, previous: tuple[int, int] | None = None) -> Position:
    return Position(LANE, epoch, number, previous)


def handle(cursors: Cursors, connection: Connection, position: Position) -> Message | None:
    """Have the message at *position* take effect; returns what that releases."""
    cursor = cursors.find(connection, "charge", LANE)
    assert cursor.turn_of(position) is Turn.now
    released = cursors.advance(connection, "charge", position, cursor)
    connection.commit()
    return released


def park(cursors: Cursors, connection: Connection, position: Position) -> Message:
    parked = message().at(position)
    assert cursors.park(connection, "charge", position, parked)
    connection.commit()
    return parked


@pytest.mark.parametrize(
    ("cursor", "position", "turn"),
    [
        (Cursor(), at(1), Turn.now),
        (Cursor(), at(2), Turn.later),
        (Cursor(OLD, 4), at(4), Turn.past),
        (Cursor(OLD, 4), at(5), Turn.now),
        (Cursor(OLD, 4), at(6), Turn.later),
        (Cursor(NEW, 4), at(5), Turn.past),
        (Cursor(OLD, 4), at(1, NEW), Turn.now),
        (Cursor(OLD, 4), at(2, NEW), Turn.later),
        (Cursor(OLD, 4, parked=1), at(1, NEW), Turn.later),
        (Cursor(OLD, 4, held=0), at(1, NEW, (OLD, 4)), Turn.later),
        (Cursor(OLD, 4), at(1, NEW, (OLD, 5)), Turn.later),
        (Cursor(), at(1, NEW, (OLD, 5)), Turn.later),
        (Cursor(OLD, 5, parked=1), at(1, NEW, (OLD, 5)), Turn.now),
        (Cursor(OLD, 6), at(1, NEW, (OLD, 5)), Turn.now),
    ],
)
def test_a_turn_is_told_from_epoch_and_number(
    cursor: Cursor, position: Position, turn: Turn
) -> None:
    assert cursor.turn_of(position) is turn


def test_a_message_that_comes_early_is_released_by_its_predecessor(
    cursors: Cursors, connection: Connection
) -> None:
    third, second = (park(cursors, connection, at(number)) for number in (3, 2))

    assert handle(cursors, connection, at(1)) == second
    assert handle(cursors, connection, at(2)) == third
    assert handle(cursors, connection, at(3)) is None
    assert cursors.find(connection, "charge", LANE) == Cursor(OLD, 3, written=True)
    assert connection.execute(select(cursors.parked)).all() == []


def test_a_released_message_stays_parked_until_it_has_had_its_end(
    cursors: Cursors, connection: Connection
) -> None:
    park(cursors, connection, at(2))

    handle(cursors, connection, at(1))

    assert cursors.find(connection, "charge", LANE).parked == 1


def test_a_copy_of_a_parked_message_changes_nothing(
    cursors: Cursors, connection: Connection
) -> None:
    parked = park(cursors, connection, at(2))

    assert cursors.park(connection, "charge", at(2), parked)
    assert cursors.find(connection, "charge", LANE).parked == 1


def test_another_message_at_the_place_of_a_parked_one_is_refused(
    cursors: Cursors, connection: Connection
) -> None:
    park(cursors, connection, at(2))

    with pytest.raises(PositionTaken):
        cursors.park(connection, "charge", at(2), message().at(at(2)))


def test_what_is_parked_after_its_predecessors_end_finds_that_its_turn_has_come(
    cursors: Cursors, connection: Connection, database: Database
) -> None:
    with database.engine.connect() as other:
        seen = cursors.find(other, "charge", LANE)
        other.rollback()
        handle(cursors, connection, at(1))

        assert seen.turn_of(at(2)) is Turn.later
        assert not cursors.park(other, "charge", at(2), message().at(at(2)))


def test_an_end_that_comes_while_a_successor_is_parked_wakes_it(
    cursors: Cursors, connection: Connection, database: Database
) -> None:
    """At every isolation level: the head has read its cursor before the successor parks."""
    for level in ("READ COMMITTED", "REPEATABLE READ"):
        if database.vendor == "sqlite" and level == "REPEATABLE READ":
            continue  # one writer, one level
        engine = database.engine.execution_options(isolation_level=level)
        if database.vendor == "sqlite":
            engine = database.engine
        with engine.connect() as head:
            cursor = cursors.find(head, "charge", LANE)
            number = cursor.last + 1
            waiting = park(cursors, connection, at(number + 1))

            try:
                released = cursors.advance(head, "charge", at(number), cursor)
                head.commit()
            except (LostRace, OperationalError):
                # PostgreSQL refuses what its snapshot cannot see; the handler is run again.
                head.rollback()
                released = handle(cursors, head, at(number))

            assert released == waiting
        handle(cursors, connection, at(number + 1))


def test_nobody_moves_the_cursor_while_a_message_is_being_parked(
    cursors: Cursors, connection: Connection, database: Database
) -> None:
    """Between the look at the cursor and the row of what is parked, a wake-up would be lost."""
    handle(cursors, connection, at(1))
    head = cursors.find(connection, "charge", LANE)
    connection.rollback()
    order: list[str] = []

    def advance() -> Message | None:
        with database.engine.connect() as other:
            released = cursors.advance(other, "charge", at(2), head)
            order.append("advanced")
            other.commit()
            return released

    with ThreadPoolExecutor() as threads, database.engine.connect() as parking:
        waiting = message().at(at(3))
        looked = cursors.lock(parking, "charge", LANE)
        advancing = threads.submit(advance)
        time.sleep(0.2)  # it waits, if it has to
        order.append("parked")
        assert looked.turn_of(at(3)) is Turn.later
        assert cursors.park(parking, "charge", at(3), waiting)
        parking.commit()

        assert advancing.result() == waiting
    assert order == ["parked", "advanced"]


def test_two_that_take_the_same_turn_do_not_both_get_it(
    cursors: Cursors, connection: Connection, database: Database
) -> None:
    with database.engine.connect() as other:
        cursor = cursors.find(other, "charge", LANE)
        other.rollback()
        handle(cursors, connection, at(1))

        with pytest.raises(LostRace):
            cursors.advance(other, "charge", at(1), cursor)


def test_a_failed_message_holds_its_key_until_it_has_an_end(
    cursors: Cursors, connection: Connection
) -> None:
    second = park(cursors, connection, at(2))

    cursors.block(connection, "charge", at(1), revision=3)
    connection.commit()

    assert cursors.find(connection, "charge", LANE).held == 3
    assert handle(cursors, connection, at(1)) == second
    assert cursors.find(connection, "charge", LANE).held is None


def test_another_consumer_another_source_and_another_key_are_not_concerned(
    cursors: Cursors, connection: Connection
) -> None:
    handle(cursors, connection, at(1))

    for consumer, lane in (
        ("mail", LANE),
        ("charge", Lane("other shop", "charge", LANE.key)),
        ("charge", Lane("shop", "charge", "Account 7")),
    ):
        assert cursors.find(connection, consumer, lane) == Cursor()


def test_a_new_epoch_waits_for_the_end_of_the_one_before(
    cursors: Cursors, connection: Connection
) -> None:
    """A planned change: the first message says what has to come before it."""
    first_of_new, second_of_new = (
        park(cursors, connection, place) for place in (at(1, NEW, (OLD, 2)), at(2, NEW))
    )
    second = park(cursors, connection, at(2))

    assert handle(cursors, connection, at(1)) == second
    assert handle(cursors, connection, at(2)) == first_of_new
    assert handle(cursors, connection, at(1, NEW, (OLD, 2))) == second_of_new
    assert handle(cursors, connection, at(2, NEW)) is None
    assert cursors.find(connection, "charge", LANE) == Cursor(NEW, 2, written=True)


def test_what_waits_in_an_epoch_that_was_given_up_is_not_forgotten(
    cursors: Cursors, connection: Connection
) -> None:
    """The producer was restored from a backup; what it had sent beyond that waits, unread."""
    handle(cursors, connection, at(1))
    kept = park(cursors, connection, at(7))

    handle(cursors, connection, at(1, NEW, (OLD, 1)))

    assert connection.scalars(select(cursors.parked.c.message_id)).all() == [kept.identity.id]


def test_a_lost_release_is_swept_up(cursors: Cursors, connection: Connection) -> None:
    second = park(cursors, connection, at(2))
    handle(cursors, connection, at(1))

    assert cursors.sweep(connection, seconds=60, limit=10) == []
    connection.execute(update(cursors.parked).values(released_at=None))

    assert cursors.sweep(connection, seconds=60, limit=10) == [second]
    assert cursors.sweep(connection, seconds=60, limit=10) == []


def test_what_waits_for_its_predecessor_is_not_swept_up(
    cursors: Cursors, connection: Connection
) -> None:
    park(cursors, connection, at(3))
    handle(cursors, connection, at(1))
    cursors.block(connection, "charge", at(2), revision=0)
    park(cursors, connection, at(4))
    connection.commit()

    assert cursors.sweep(connection, seconds=0, limit=10) == []


def test_parking_that_only_locks_loses_the_wake_up_at_repeatable_read(
    cursors: Cursors,
    connection: Connection,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the counter is for: without it the head, with an older snapshot, sees nobody wait."""
    if database.vendor != "postgresql":
        pytest.skip("the others read what is locked, whatever their snapshot")
    handle(cursors, connection, at(1))
    monkeypatch.setattr(Cursors, "_count_parked", lambda *_: None)
    engine = create_engine(database.engine.url, isolation_level="REPEATABLE READ")
    with engine.connect() as head:
        cursor = cursors.find(head, "charge", LANE)
        park(cursors, connection, at(3))

        released = cursors.advance(head, "charge", at(2), cursor)
        head.commit()

    assert released is None
    engine.dispose()
