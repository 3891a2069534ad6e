"""Numbers in the order of the commits, on every database."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Connection, select, update
from sqlalchemy.exc import OperationalError

from celery_eda.core.identity import ANY, Lane, Position
from celery_eda.core.message import Message
from celery_eda.ordering.sequences import Sequences
from tests.support.databases import Database
from tests.support.messages import message


@pytest.fixture
def sequences(database: Database) -> Sequences:
    return Sequences(database.tables.sequences, database.dialect)


def of_key(*keys: str) -> list[Message]:
    return [message(lane=Lane("shop", "charge", key)) for key in keys]


def places(numbered: Sequence[Message]) -> list[Position | None]:
    return [Position.of_headers(each.headers) for each in numbered]


def numbers(numbered: Sequence[Message]) -> list[int]:
    return [place.number for place in places(numbered) if place]


def test_the_messages_of_a_key_are_counted_from_one(
    database: Database, sequences: Sequences
) -> None:
    with database.engine.begin() as connection:
        first = sequences.number(connection, of_key("a", "b", "a"))
    with database.engine.begin() as connection:
        second = sequences.number(connection, of_key("a", "c"))

    assert numbers(first) == [1, 1, 2]
    assert numbers(second) == [3, 1]
    assert [place.lane.key for place in places(first) if place] == ["a", "b", "a"]


def test_messages_without_a_key_are_left_alone(database: Database, sequences: Sequences) -> None:
    plain = message()

    with database.engine.begin() as connection:
        assert sequences.number(connection, [plain]) == [plain]


def test_a_transaction_that_rolls_back_gives_its_numbers_back(
    database: Database, sequences: Sequences
) -> None:
    with database.engine.connect() as connection:
        sequences.number(connection, of_key("a", "a"))
        connection.rollback()
        again = sequences.number(connection, of_key("a"))
        connection.commit()

    assert numbers(again) == [1]


def test_a_savepoint_that_rolls_back_gives_its_numbers_back(
    database: Database, sequences: Sequences
) -> None:
    with database.engine.begin() as connection:
        first = sequences.number(connection, of_key("a"))
        savepoint = connection.begin_nested()
        sequences.number(connection, of_key("a", "a"))
        savepoint.rollback()
        second = sequences.number(connection, of_key("a"))

    assert numbers(first + second) == [1, 2]


def test_keys_that_differ_in_case_blanks_or_unicode_form_are_counted_apart(
    database: Database, sequences: Sequences
) -> None:
    keys = ["a", "A", "a ", "é", "e\u0301", "ß", "ss"]

    with database.engine.begin() as connection:
        assert numbers(sequences.number(connection, of_key(*keys))) == [1] * len(keys)


def test_a_thousand_keys_are_numbered_at_once(database: Database, sequences: Sequences) -> None:
    keys = [str(number) for number in range(1000)] * 2
    random.shuffle(keys)

    with database.engine.begin() as connection:
        numbered = sequences.number(connection, of_key(*keys))

    assert Counter(numbers(numbered)) == {1: 1000, 2: 1000}


def test_numbers_are_in_the_order_of_the_commits_without_a_gap(
    database: Database, sequences: Sequences
) -> None:
    """Producers race for three keys, taken crosswise, and every third rolls back.

    InnoDB may let one lose that waits for the first row of a key whose maker rolls back: then, too,
    the whole transaction is undone.
    """
    committed: list[tuple[str, int]] = []
    lock = threading.Lock()

    def produce(connection: Connection, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(15):
            keys = chance.sample(["a", "b", "c"], 2)
            transaction = connection.begin()
            try:
                numbered = sequences.number(connection, of_key(*keys))
            except OperationalError as error:
                if not database.dialect.is_transient(error):
                    raise
                transaction.rollback()
                continue
            time.sleep(0.001)
            if chance.random() < 0.33:
                transaction.rollback()
                continue
            with lock:  # what is noted here is noted in the order of the commits
                transaction.commit()
                committed.extend(zip(keys, numbers(numbered), strict=True))

    def in_thread(seed: int) -> None:
        with database.engine.connect() as connection:
            produce(connection, seed)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(in_thread, range(4)))

    for key in "abc":
        given = [number for each, number in committed if each == key]
        assert given == list(range(1, len(given) + 1))


def test_a_new_epoch_waits_for_nothing_that_may_be_lost(
    database: Database, sequences: Sequences
) -> None:
    with database.engine.begin() as connection:
        sequences.number(connection, of_key("a", "a", "b"))
        assert sequences.begin_epoch(connection, awaited=True) == 2
        sequences.number(connection, of_key("b"))

        assert sequences.begin_epoch(connection) == 2
        a, b, second = places(sequences.number(connection, of_key("a", "b", "b")))
        assert sequences.begin_epoch(connection, stream="other") == 0

    assert [(each.number, each.previous) for each in (a, b, second) if each] == [
        (1, ANY),
        (1, ANY),
        (2, None),
    ]


def test_a_new_epoch_is_later_than_one_that_began_while_the_clock_was_ahead(
    database: Database, sequences: Sequences
) -> None:
    an_hour_ahead = round(time.time() * 1000) + 3_600_000
    with database.engine.begin() as connection:
        sequences.number(connection, of_key("a"))
        connection.execute(update(sequences.table).values(epoch=an_hour_ahead))

        sequences.begin_epoch(connection)
        (place,) = places(sequences.number(connection, of_key("a")))

    assert place is not None
    assert place.epoch == an_hour_ahead + 1


def test_a_new_epoch_leaves_one_that_consumers_refuse(
    database: Database, sequences: Sequences
) -> None:
    """The clock was ten years ahead when it began."""
    with database.engine.begin() as connection:
        sequences.number(connection, of_key("a"))
        ahead = update(sequences.table).values(
            epoch=sequences.table.c.epoch + 10 * 365 * 86_400_000
        )
        connection.execute(ahead)
        (refused,) = sequences.number(connection, of_key("a"))

        sequences.begin_epoch(connection)
        (message,) = sequences.number(connection, of_key("a"))

    assert refused.position is None
    assert message.position is not None
    assert abs(message.position.epoch / 1000 - time.time()) < 60


def test_a_new_epoch_begins_again_with_one_and_knows_what_came_before(
    database: Database, sequences: Sequences
) -> None:
    with database.engine.begin() as connection:
        (old,) = places(sequences.number(connection, of_key("a", "a")))[1:]
    time.sleep(0.002)  # epochs are milliseconds

    with database.engine.begin() as connection:
        assert sequences.begin_epoch(connection, awaited=True) == 1
        first, second = places(sequences.number(connection, of_key("a", "a")))

    assert old is not None
    assert first is not None
    assert second is not None
    assert first.epoch > old.epoch
    assert (first.number, first.previous) == (1, (old.epoch, 2))
    assert (second.number, second.previous) == (2, None)


def test_a_sequence_that_was_lost_begins_a_later_epoch_by_itself(
    database: Database, sequences: Sequences
) -> None:
    with database.engine.begin() as connection:
        (old,) = places(sequences.number(connection, of_key("a")))
        connection.execute(sequences.table.delete())
    time.sleep(0.002)

    with database.engine.begin() as connection:
        (new,) = places(sequences.number(connection, of_key("a")))

    assert old is not None
    assert new is not None
    assert new.epoch > old.epoch


def test_an_epoch_is_the_time_by_the_clock_of_the_database(
    database: Database, sequences: Sequences
) -> None:
    with database.engine.begin() as connection:
        (place,) = places(sequences.number(connection, of_key("a")))

    assert place is not None
    assert abs(place.epoch / 1000 - time.time()) < 60


def test_without_the_rows_lock_two_transactions_get_the_same_number(
    database: Database, sequences: Sequences
) -> None:
    """What the lock is for: read, then written, the count gives a number twice."""
    if database.vendor == "sqlite":
        pytest.skip("it has one writer, whose transaction is the lock")
    with database.engine.begin() as connection:
        sequences.number(connection, of_key("a"))
    columns = sequences.table.c

    def read_then_write(connection: Connection) -> int:
        last: int = connection.scalar(select(columns.last)) or 0
        return last + 1

    with database.engine.connect() as one, database.engine.connect() as other:
        given = [read_then_write(one), read_then_write(other)]
        for connection, number in zip((one, other), given, strict=True):
            connection.execute(update(sequences.table).values(last=number))
            connection.commit()

    assert given == [2, 2]
