from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from typing import Any

import pytest
from sqlalchemy import select, update

from celery_eda.core.error_text import LONGEST_ERROR
from celery_eda.core.identity import Lane, Position
from celery_eda.core.message import Message
from celery_eda.databases import message_rows
from celery_eda.dead_letters.letter import Letter, LetterFilter, LetterState, Reason
from celery_eda.dead_letters.reduced import HEAD
from celery_eda.dead_letters.store import DeadLetterStore
from tests.support.databases import LOCKING, Database
from tests.support.messages import message


class Unreadable(Exception):
    """An error that cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def kept(
    database: Database,
    dead_letters: DeadLetterStore,
    letter: Message,
    error: BaseException | str = "refused",
    **details: Any,
) -> Any:
    """The row of *letter* after it was committed."""
    with database.engine.begin() as connection:
        dead_letters.add(
            connection, letter, Reason.failed, error=error, **{"attempts": 1, **details}
        )
    with database.engine.connect() as connection:
        return connection.execute(select(dead_letters.table)).one()


def raised(error: Exception) -> Exception:
    """*error*, with a traceback."""
    try:
        raise error
    except Exception as caught:
        return caught


def test_a_dead_letter_keeps_the_whole_message(
    database: Database, dead_letters: DeadLetterStore
) -> None:
    letter = message(
        body=bytes(range(256)) * 1024, headers={"emoji": "🍫", "nul": "\0"}, queue="münzen"
    )

    row = kept(database, dead_letters, letter)

    assert message_rows.from_row(row) == letter


@pytest.mark.parametrize(
    "odd",
    [
        message(task="nul\0", routing_key="nul\0", content_type="nul\0"),
        message(task="\ud800", exchange="\ud800", queue="\ud800"),
        message(content_encoding="utf" + 300 * "-" + "8", routing_key="x" * 5000),
        message(headers={"root_id": "\ud800", "parent_id": "nul\0", "eda_order": ["nul\0"] * 5}),
        message(headers={"eda_order": ["é" * 200, "s", "é" * 200, 1, 1]}),
        message(headers={"\ud800": "\0"}, properties={"reply_to": "\ud800\0"}),
    ],
)
def test_whatever_the_names_of_a_message_it_is_stored(
    database: Database, dead_letters: DeadLetterStore, odd: Message
) -> None:
    error = type("Odd", (Exception,), {"__qualname__": "odd\0\ud800"})("x")

    row = kept(database, dead_letters, odd, error, attempts=2**31)

    stored = message_rows.from_row(row)
    assert (stored.body, stored.headers) == (odd.body, odd.headers)
    assert stored.properties == odd.properties
    assert row.attempts == 2**31 - 1


REFUSAL = {
    "postgresql": (
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF octet_length(NEW.body) > 65536 THEN RAISE 'too long' USING ERRCODE = '22001'; END IF;"
        " RETURN NEW; END $$",
        "CREATE TRIGGER refusal BEFORE INSERT ON eda_dead_letters"
        " FOR EACH ROW EXECUTE FUNCTION refuse()",
    ),
    "mariadb": (
        "CREATE TRIGGER refusal BEFORE INSERT ON eda_dead_letters FOR EACH ROW BEGIN"
        " IF LENGTH(NEW.body) > 65536 THEN"
        " SIGNAL SQLSTATE '22001' SET MYSQL_ERRNO = 1406, MESSAGE_TEXT = 'too long'; END IF; END",
    ),
}
ACCEPTANCE = {
    "postgresql": "DROP FUNCTION refuse() CASCADE",
    "mariadb": "DROP TRIGGER refusal",
}


@pytest.fixture
def choosy(database: Database) -> Iterator[Database]:
    """A database that refuses dead letters with a long body."""
    with database.engine.begin() as connection:
        for statement in REFUSAL[database.vendor]:
            connection.exec_driver_sql(statement)
    yield database
    with database.engine.begin() as connection:
        connection.exec_driver_sql(ACCEPTANCE[database.vendor])


def expect_reduced(row: Any, letter: Message, why: str) -> None:
    stored = message_rows.from_row(row)
    about = stored.headers["eda_reduced"]
    assert letter.body.startswith(stored.body)
    assert (len(stored.body), about["bytes"]) == (HEAD, len(letter.body))
    assert about["sha256"] == sha256(letter.body).hexdigest()
    assert why in about["why"]
    assert stored.headers["id"] == letter.headers["id"]


@pytest.mark.parametrize("database", LOCKING, indirect=True)
def test_what_a_database_refuses_for_a_value_is_stored_in_reduced_form(
    choosy: Database, dead_letters: DeadLetterStore
) -> None:
    letter = message(body=bytes(range(256)) * 1024)

    row = kept(choosy, dead_letters, letter)

    expect_reduced(row, letter, "the database refuses it: DataError")


@pytest.mark.parametrize("database", ["mariadb"], indirect=True)
@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"x" * 17 * 2**20, {}),
        (b'"' * 9 * 2**20, {}),  # each is written as two bytes
        (b"x" * 9 * 2**20, {"x": "y" * 8 * 2**20, "z": [1]}),
    ],
)
def test_what_is_larger_than_a_packet_of_the_database_is_stored_in_reduced_form(
    database: Database, dead_letters: DeadLetterStore, body: bytes, headers: dict[str, Any]
) -> None:
    letter = message(body=body, headers=headers)

    row = kept(database, dead_letters, letter)

    expect_reduced(row, letter, "max_allowed_packet")


def test_a_dead_letter_says_why_where_and_after_how_many_attempts(
    database: Database, dead_letters: DeadLetterStore
) -> None:
    row = kept(
        database,
        dead_letters,
        message(),
        raised(ValueError("no such card 🍫")),
        attempts=3,
        consumer="shop.charge",
    )

    assert (row.reason, row.consumer, row.attempts) == ("failed", "shop.charge", 3)
    assert (row.error_type, row.error) == ("ValueError", "no such card 🍫")
    assert "in raised" in row.traceback


def test_a_message_that_never_reached_a_consumer_names_none(
    database: Database, dead_letters: DeadLetterStore
) -> None:
    row = kept(database, dead_letters, message(), "unroutable")

    assert (row.consumer, row.error_type, row.error, row.traceback) == (
        None,
        None,
        "unroutable",
        None,
    )


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Unreadable(), "<Unreadable without a readable text>"),
        (ValueError("a\0b"), "a\\0b"),
        (ValueError("a\ud800b"), "a\\ud800b"),
        (ValueError("x" * 10**7), "x" * LONGEST_ERROR),
        (ValueError("🍫" * 10**5), "🍫" * LONGEST_ERROR),
        (type("x" * 300, (Exception,), {})("long name"), "long name"),
    ],
    ids=["unreadable", "NUL", "surrogate", "10 MB", "emoji", "long name"],
)
def test_no_error_is_too_odd_to_be_kept(
    database: Database, dead_letters: DeadLetterStore, error: Exception, text: str
) -> None:
    row = kept(database, dead_letters, message(), raised(error))

    assert row.error == text


def test_a_dead_letter_shares_the_fate_of_its_transaction(
    database: Database, dead_letters: DeadLetterStore
) -> None:
    with database.engine.connect() as connection:
        dead_letters.add(connection, message(), Reason.rejected, error="", attempts=1)
        connection.rollback()

        assert connection.execute(select(dead_letters.table)).all() == []


# ── reading ─────────────────────────────────────────────────────────────────────────────────

LANE = Lane("shop", "shop.charge", "account 7")


def add(database: Database, dead_letters: DeadLetterStore, letter: Message, **details: Any) -> int:
    """Commit *letter*; returns its id."""
    details = {"reason": Reason.failed, "error": ValueError("no"), "attempts": 1, **details}
    with database.engine.begin() as connection:
        return dead_letters.add(connection, letter, **details)


def found(database: Database, dead_letters: DeadLetterStore, id: int) -> Letter:
    with database.engine.connect() as connection:
        letter = dead_letters.find(connection, id)
    assert letter is not None
    return letter


def test_a_letter_is_read_as_it_was_written(
    database: Database, dead_letters: DeadLetterStore
) -> None:
    headers = {"root_id": "root", "parent_id": "parent", "n": 1}
    placed = message(headers=headers, queue="q").at(Position(LANE, 1000, 3))
    first = datetime(2026, 1, 2, 3, 4, 5, 678, timezone.utc)

    id = add(database, dead_letters, placed, consumer="shop.charge", first_at=first)
    letter = found(database, dead_letters, id)

    assert letter.message == placed
    assert (letter.id, letter.consumer, letter.key) == (id, "shop.charge", "account 7")
    assert (letter.correlation_id, letter.causation_id) == ("root", "parent")
    assert (letter.error_type, letter.error, letter.attempts) == ("ValueError", "no", 1)
    assert (letter.state, letter.is_open) == ("open", True)
    assert letter.first_at == first
    assert abs(datetime.now(timezone.utc) - letter.at) < timedelta(minutes=1)


def test_a_first_attempt_is_the_last_one_too(
    database: Database, dead_letters: DeadLetterStore
) -> None:
    letter = found(database, dead_letters, add(database, dead_letters, message()))

    assert letter.first_at is not None
    assert letter.at - letter.first_at < timedelta(seconds=1)


@pytest.mark.parametrize(
    "headers",
    [
        {"root_id": 7, "parent_id": ["x"], "eda_order": "nonsense"},
        {"root_id": "x" * 10**5, "parent_id": "a\0b", "eda_order": [1, 2]},
        {"root_id": "\ud800" * 255, "parent_id": None},
    ],
)
def test_no_header_is_too_odd_to_be_kept(
    database: Database, dead_letters: DeadLetterStore, headers: dict[str, Any]
) -> None:
    odd = replace(message(), headers=headers)

    letter = found(database, dead_letters, add(database, dead_letters, odd))

    assert letter.message.headers == headers
    assert letter.key is None


def test_there_is_no_letter_of_an_unknown_id(
    database: Database, dead_letters: DeadLetterStore
) -> None:
    with database.engine.connect() as connection:
        assert dead_letters.find(connection, 7) is None
        assert dead_letters.find(connection, 7, lock=True) is None


def test_each_filter_finds_its_letters(database: Database, dead_letters: DeadLetterStore) -> None:
    plain = add(database, dead_letters, message())
    other = message(task="shop.ship", routing_key="ships", queue="docks", headers={"x": 1}).at(
        Position(LANE, 1, 1)
    )
    id = add(database, dead_letters, other, reason=Reason.rejected, error=KeyError("k"))
    with database.engine.begin() as connection:
        dead_letters.close(connection, id, LetterState.redriven)
        long_ago = datetime(2020, 1, 1, tzinfo=timezone.utc)
        connection.execute(
            update(dead_letters.table).where(dead_letters.table.c.id == id).values(at=long_ago)
        )

    for which in (
        LetterFilter(ids=(id, 10**6)),
        LetterFilter(task="shop.ship"),
        LetterFilter(queue="docks"),
        LetterFilter(queue="ships"),
        LetterFilter(error_type="KeyError"),
        LetterFilter(key="account 7"),
        LetterFilter(reason="rejected"),
        LetterFilter(state="redriven"),
        LetterFilter(message_id=other.identity.id),
        LetterFilter(until=long_ago + timedelta(seconds=1)),
        LetterFilter(since=long_ago, until=long_ago + timedelta(microseconds=1)),
        # The same moment as a clock elsewhere shows it.
        LetterFilter(
            until=(long_ago + timedelta(hours=1)).astimezone(timezone(timedelta(hours=9)))
        ),
    ):
        with database.engine.connect() as connection:
            letters = dead_letters.select(connection, which)
            assert ([each.id for each in letters], which) == ([id], which)
            assert dead_letters.count(connection, which) == 1
    with database.engine.connect() as connection:
        now = datetime.now(timezone.utc)
        recent = dead_letters.select(connection, LetterFilter(since=now - timedelta(minutes=5)))
        assert [each.id for each in recent] == [plain]
        assert dead_letters.select(connection, LetterFilter(until=long_ago)) == []


def test_a_moment_without_a_time_zone_is_utc_wherever_this_runs(
    database: Database, dead_letters: DeadLetterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "ELSEWHERE+5")
    time.tzset()
    try:
        with database.engine.begin() as connection:
            dead_letters.add(connection, message(), Reason.failed, error="…", attempts=1)
            now = datetime.now(timezone.utc).replace(tzinfo=None)
            minute = timedelta(minutes=1)

            found = dead_letters.count(
                connection, LetterFilter(since=now - minute, until=now + minute)
            )
    finally:
        monkeypatch.undo()
        time.tzset()

    assert found == 1


def test_letters_are_read_page_by_page(database: Database, dead_letters: DeadLetterStore) -> None:
    ids = [add(database, dead_letters, message()) for _ in range(5)]
    with database.engine.connect() as connection:
        pages = [
            [each.id for each in dead_letters.select(connection, LetterFilter(), 2, after)]
            for after in (0, ids[1], ids[3], ids[4])
        ]

    assert pages == [ids[:2], ids[2:4], ids[4:], []]


def test_a_letter_can_hold_another_body(database: Database, dead_letters: DeadLetterStore) -> None:
    id = add(database, dead_letters, message())
    before = found(database, dead_letters, id)
    changed = replace(before.message, body=b"[]", headers={"new": 1})
    with database.engine.begin() as connection:
        dead_letters.change(connection, id, changed)

    assert found(database, dead_letters, id) == replace(before, message=changed)


# ── secrets ─────────────────────────────────────────────────────────────────────────────────


def test_no_secret_reaches_the_error_fields(
    database: Database, dead_letters: DeadLetterStore
) -> None:
    letter = message(
        body=b'[[7], {"password": "hunter2-arg", "card": {"cvc": "hunter2-deep"}}, {}]'
    )
    text = "hunter2-arg hunter2-deep token=hunter2-text amqp://u:hunter2-dsn@h " + "x" * 20_000

    row = kept(database, dead_letters, letter, raised(ValueError(text)))

    assert "hunter2" not in row.error
    assert "hunter2" not in row.traceback
    assert len(row.error) == LONGEST_ERROR


def test_a_secret_is_not_cut_in_half(database: Database, dead_letters: DeadLetterStore) -> None:
    letter = message(body=b'[[], {"password": "hunter2-hunter2"}, {}]')

    row = kept(database, dead_letters, letter, "x" * (LONGEST_ERROR - 7) + "hunter2-hunter2")

    assert "hunter2" not in row.error


def test_a_traceback_shows_no_local_values(
    database: Database, dead_letters: DeadLetterStore
) -> None:
    def fail(number: str) -> None:
        raise ValueError("no")

    try:
        fail("4929" + "1234")
    except ValueError as error:
        row = kept(database, dead_letters, message(), error)

    assert "in fail" in row.traceback
    assert "49291234" not in row.traceback
