"""Whose turn it is, what waits, and who wakes it, on every database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Connection, create_engine, select, update
from sqlalchemy.exc import OperationalError

from celery_eda.core.identity import ANY, Lane, Position
from celery_eda.core.message import Message
from celery_eda.databases.lost_race import LostRace
from celery_eda.ordering.cursor import Cursor, Turn
from celery_eda.ordering.cursors import Cursors, PositionTaken
from celery_eda.ordering.gaps import Gaps
from celery_eda.ordering.progress import Progress
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
        (Cursor(OLD, 4, parked=1, oldest=OLD), at(1, NEW), Turn.later),
        (Cursor(OLD, 4, parked=1, oldest=NEW), at(1, NEW), Turn.now),
        (Cursor(OLD, 4, parked=1, oldest=OLD), at(1, NEW, ANY), Turn.later),
        (Cursor(OLD, 4, parked=1, oldest=NEW), at(1, NEW, ANY), Turn.now),
        (Cursor(parked=1, oldest=OLD), at(1, NEW), Turn.later),
        (Cursor(OLD, 4), at(1, NEW, ANY), Turn.now),
        (Cursor(), at(1, NEW, ANY), Turn.now),
        (Cursor(OLD, 4, held=0), at(1, NEW, ANY), Turn.later),
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


@pytest.mark.parametrize("previous", [None, ANY])
def test_a_new_epoch_that_knows_no_end_of_the_one_before_waits_for_what_is_parked(
    cursors: Cursors, connection: Connection, previous: tuple[int, int] | None
) -> None:
    """Parked itself, it does not wait for itself."""
    handle(cursors, connection, at(1))
    third = park(cursors, connection, at(3))
    first_of_new = park(cursors, connection, at(1, NEW, previous))

    assert handle(cursors, connection, at(2)) == third
    assert handle(cursors, connection, at(3)) == first_of_new
    assert handle(cursors, connection, at(1, NEW, previous)) is None


def test_what_waits_in_an_epoch_that_was_left_is_sent_again_to_become_a_dead_letter(
    cursors: Cursors, connection: Connection
) -> None:
    """The producer was restored from a backup; what it had sent beyond that waits, unread."""
    handle(cursors, connection, at(1))
    kept = park(cursors, connection, at(7))

    handle(cursors, connection, at(1, NEW, (OLD, 1)))

    assert connection.scalars(select(cursors.parked.c.message_id)).all() == [kept.identity.id]
    assert cursors.sweep(connection, seconds=60, limit=10) == [kept]
    assert connection.execute(select(cursors.parked)).all() == []
    assert cursors.find(connection, "charge", LANE) == Cursor(NEW, 1, written=True)


# ── gaps ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def progress(database: Database) -> Progress:
    return Progress(database.tables.cursors, database.tables.parked, database.dialect)


def test_a_key_that_waits_says_for_what_and_since_when(
    cursors: Cursors, connection: Connection, progress: Progress
) -> None:
    handle(cursors, connection, at(1))
    for number in (6, 5):
        park(cursors, connection, at(number))

    (key,) = progress.waiting(connection)

    assert (key.consumer, key.lane, key.awaited, key.following) == ("charge", LANE, 2, (OLD, 5))
    assert (key.parked, key.held, key.gap) == (2, None, "numbers 2 to 4")
    assert abs(time.time() - key.since.timestamp()) < 60
    assert progress.waiting(connection, seconds=60) == []
    assert progress.waiting(connection, is_held=True) == []
    assert progress.waiting(connection, key="another") == []
    assert [each.lane for each in progress.waiting(connection, key=LANE.key)] == [LANE]


def test_a_key_whose_next_message_is_parked_or_that_is_blocked_does_not_wait_for_a_lost_one(
    cursors: Cursors, connection: Connection, progress: Progress
) -> None:
    park(cursors, connection, at(2))
    handle(cursors, connection, at(1))

    assert progress.waiting(connection) == []

    handle(cursors, connection, at(2))
    park(cursors, connection, at(4))
    cursors.block(connection, "charge", at(3), revision=0)
    connection.commit()
    assert [key.held for key in progress.waiting(connection)] == [0]
    assert progress.waiting(connection, is_held=False) == []


def test_a_gap_is_skipped_to_the_lowest_parked_message(
    cursors: Cursors, connection: Connection, progress: Progress
) -> None:
    handle(cursors, connection, at(1))
    fifth, fourth = (park(cursors, connection, at(number)) for number in (5, 4))
    gaps = Gaps(cursors, progress)
    (key,) = progress.waiting(connection)

    assert gaps.skip(connection, key) == fourth
    connection.commit()

    assert handle(cursors, connection, at(4)) == fifth
    assert handle(cursors, connection, at(5)) is None
    assert cursors.find(connection, "charge", LANE) == Cursor(OLD, 5, written=True)
    with pytest.raises(LostRace):
        gaps.skip(connection, key)


def test_a_gap_at_the_end_of_an_epoch_is_skipped_to_the_next_one(
    cursors: Cursors, connection: Connection, progress: Progress
) -> None:
    handle(cursors, connection, at(1))
    first_of_new = park(cursors, connection, at(1, NEW, (OLD, 5)))
    (key,) = progress.waiting(connection)

    assert Gaps(cursors, progress).skip(connection, key) == first_of_new

    assert handle(cursors, connection, at(1, NEW, (OLD, 5))) is None


def test_a_blocked_key_is_not_skipped(
    cursors: Cursors, connection: Connection, progress: Progress
) -> None:
    cursors.block(connection, "charge", at(1), revision=0)
    park(cursors, connection, at(3))
    (key,) = progress.waiting(connection)

    with pytest.raises(LostRace):
        Gaps(cursors, progress).skip(connection, key)


def test_keys_whose_producer_was_restored_are_found(
    cursors: Cursors, connection: Connection, progress: Progress
) -> None:
    gaps = Gaps(cursors, progress)
    park(cursors, connection, at(3))
    assert gaps.given_up(connection, 10) == []

    park(cursors, connection, at(1, NEW, ANY))

    assert [key.following for key in gaps.given_up(connection, 10)] == [(OLD, 3)]


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
