from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from celery_eda import outbox
from celery_eda.dead_letters import LONGEST_ERROR, DeadLetters, Reason
from celery_eda.message import Message
from tests.databases import Database
from tests.dialects.messages import message


class Unreadable(Exception):
    """An error that cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def kept(
    database: Database,
    dead_letters: DeadLetters,
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
    database: Database, dead_letters: DeadLetters
) -> None:
    letter = message(
        body=bytes(range(256)) * 1024, headers={"emoji": "🍫", "nul": "\0"}, queue="münzen"
    )

    row = kept(database, dead_letters, letter)

    assert outbox.from_row(row) == letter


def test_a_dead_letter_says_why_where_and_after_how_many_attempts(
    database: Database, dead_letters: DeadLetters
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
    database: Database, dead_letters: DeadLetters
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
    database: Database, dead_letters: DeadLetters, error: Exception, text: str
) -> None:
    row = kept(database, dead_letters, message(), raised(error))

    assert row.error == text


def test_a_dead_letter_shares_the_fate_of_its_transaction(
    database: Database, dead_letters: DeadLetters
) -> None:
    with database.engine.connect() as connection:
        dead_letters.add(connection, message(), Reason.rejected, error="", attempts=1)
        connection.rollback()

        assert connection.execute(select(dead_letters.table)).all() == []
