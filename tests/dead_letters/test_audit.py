"""What was done to dead letters is on record, with its author and reason."""

from __future__ import annotations

from uuid import uuid4

import pytest
from sqlalchemy import Connection, select

from celery_eda.core.message import Message
from celery_eda.dead_letters.audit import Action, Audit, Author
from celery_eda.dead_letters.letter import Letter, Reason
from celery_eda.dead_letters.store import DeadLetterStore
from tests.support.databases import Database
from tests.support.messages import message

ADA = Author("ada", "typo")


@pytest.fixture
def connection(database: Database) -> Connection:
    with database.engine.connect() as connection:
        yield connection


def letter_of(connection: Connection, dead_letters: DeadLetterStore, letter: Message) -> Letter:
    id = dead_letters.add(connection, letter, Reason.failed, error="", attempts=1, consumer="c")
    found = dead_letters.find(connection, id)
    assert found is not None
    return found


def test_a_record_says_who_did_what_to_which_letter_and_why(
    connection: Connection, dead_letters: DeadLetterStore, audit: Audit
) -> None:
    letter = letter_of(connection, dead_letters, message())

    audit.add(connection, ADA, Action.edit, letter, body="[[7], {}, {}]", n=[1, {"a": None}])
    (entry,) = audit.of_message(connection, letter.message.identity.id)

    assert (entry.actor, entry.action, entry.why) == ("ada", "edit", "typo")
    assert (entry.dead_letter, entry.revision) == (letter.id, 0)
    assert entry.detail == {"body": "[[7], {}, {}]", "n": [1, {"a": None}]}
    row = connection.execute(select(audit.table)).one()
    assert (row.consumer, row.message_id) == ("c", letter.message.identity.id)


def test_records_of_one_message_come_in_the_order_of_the_deeds(
    connection: Connection, dead_letters: DeadLetterStore, audit: Audit
) -> None:
    one, other = (letter_of(connection, dead_letters, message()) for _ in range(2))
    for letter, action in ((one, Action.edit), (other, Action.skip), (one, Action.redrive)):
        audit.add(connection, ADA, action, letter)

    entries = audit.of_message(connection, one.message.identity.id)

    assert [each.action for each in entries] == ["edit", "redrive"]
    assert audit.of_message(connection, uuid4()) == []


def test_deeds_are_counted_by_message_and_kind(
    connection: Connection, dead_letters: DeadLetterStore, audit: Audit
) -> None:
    letter = letter_of(connection, dead_letters, message())
    for action in (Action.repair, Action.leave, Action.repair):
        audit.add(connection, ADA, action, letter)

    assert audit.count(connection, letter.message.identity.id, Action.repair) == 2
    assert audit.count(connection, uuid4(), Action.repair) == 0


@pytest.mark.parametrize("odd", ["a\0b", "\ud800", "🍫" * 10**4, "password=hunter2", ""])
def test_no_reason_is_too_odd_and_none_holds_a_secret(
    connection: Connection, dead_letters: DeadLetterStore, audit: Audit, odd: str
) -> None:
    letter = letter_of(connection, dead_letters, message())

    audit.add(connection, Author(odd, odd), Action.skip, letter)
    (entry,) = audit.of_message(connection, letter.message.identity.id)

    assert "hunter2" not in entry.why
    assert len(entry.actor) <= 255
