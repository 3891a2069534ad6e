"""What a relay makes of the broker's answers, on a broker that answers as it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from sqlalchemy import select

from celery_eda.dead_letters import DeadLetters
from celery_eda.message import Message
from celery_eda.outbox import Outbox
from celery_eda.relay import Relay, Round
from celery_eda.settings import Settings
from celery_eda.transports.base import CONFIRMED, Answer, Verdict
from tests.databases import Database
from tests.dialects.messages import message

REFUSED = Answer(Verdict.refused, "312 NO_ROUTE")
UNKNOWN = Answer(Verdict.unknown, "no answer in time")

MakeRelay = Callable[..., tuple[Relay, list[str]]]


class ScriptedBroker:
    """Answers each message by its queue, and notes what it was sent."""

    def __init__(self, answers: dict[str, Answer], sent: list[str]) -> None:
        self.answers = answers
        self.sent = sent

    def publish(self, messages: Sequence[Message]) -> list[Answer]:
        self.sent += [each.routing_key for each in messages]
        return [self.answers.get(each.routing_key, CONFIRMED) for each in messages]

    def close(self) -> None:
        """Nothing is connected."""


@pytest.fixture
def make_relay(database: Database, outbox: Outbox, dead_letters: DeadLetters) -> MakeRelay:
    def make(answers: dict[str, Answer], **settings: object) -> tuple[Relay, list[str]]:
        sent: list[str] = []
        broker = ScriptedBroker(answers, sent)
        relay = Relay(
            database.engine,
            outbox,
            dead_letters,
            lambda: broker,
            lambda message: None,
            Settings(**settings),  # type: ignore[arg-type]
        )
        return relay, sent

    return make


def store(database: Database, outbox: Outbox, *queues: str) -> None:
    with database.engine.begin() as connection:
        outbox.add(connection, [message(routing_key=queue) for queue in queues])


def waiting(database: Database) -> list[tuple[str, int]]:
    columns = database.tables.outbox.c
    with database.engine.connect() as connection:
        rows = connection.execute(select(columns.routing_key, columns.attempts))
        return [(row.routing_key, row.attempts) for row in rows]


def test_only_what_was_confirmed_leaves_the_outbox(
    database: Database, outbox: Outbox, make_relay: MakeRelay
) -> None:
    relay, _ = make_relay({"bad": REFUSED, "mute": UNKNOWN})
    store(database, outbox, "good", "bad", "mute", "good")

    assert relay.send() == Round(confirmed=2, refused=1, unknown=1)
    assert sorted(waiting(database)) == [("bad", 1), ("mute", 0)]


def test_a_queue_that_never_confirms_does_not_hold_up_the_others(
    database: Database, outbox: Outbox, make_relay: MakeRelay
) -> None:
    relay, sent = make_relay({"mute": UNKNOWN})
    store(database, outbox, "mute", "good")

    relay.send()
    store(database, outbox, "good")
    relay.send()

    assert sent == ["mute", "good", "good"]
    assert waiting(database) == [("mute", 0)]


def test_a_row_that_cannot_be_read_says_why_and_does_not_hold_up_the_others(
    database: Database, outbox: Outbox, make_relay: MakeRelay
) -> None:
    relay, sent = make_relay({}, relay_batch=1)
    store(database, outbox, "broken", "good")
    table = database.tables.outbox
    with database.engine.begin() as connection:
        broken = table.c.routing_key == "broken"
        connection.execute(table.update().where(broken).values(headers="{"))

    relay.send()
    relay.send()

    assert sent == ["good"]
    assert waiting(database) == [("broken", 1)]
    with database.engine.connect() as connection:
        assert "cannot be read" in (connection.scalar(select(table.c.last_error)) or "")


def test_in_an_outage_messages_are_given_back_at_once_and_nothing_is_charged(
    database: Database, outbox: Outbox, make_relay: MakeRelay
) -> None:
    relay, sent = make_relay({"mute": UNKNOWN})
    store(database, outbox, "mute", "mute")

    relay.send()
    relay.send()

    assert sent == ["mute"] * 4
    assert waiting(database) == [("mute", 0), ("mute", 0)]


def test_a_message_refused_too_often_becomes_a_dead_letter_with_the_brokers_words(
    database: Database, outbox: Outbox, make_relay: MakeRelay
) -> None:
    relay, _ = make_relay({"bad": REFUSED}, max_attempts=1)
    store(database, outbox, "bad")

    relay.send()

    columns = database.tables.dead_letters.c
    with database.engine.connect() as connection:
        row = connection.execute(select(columns.reason, columns.error, columns.attempts)).one()
    assert waiting(database) == []
    assert tuple(row) == ("unsendable", "312 NO_ROUTE", 1)
