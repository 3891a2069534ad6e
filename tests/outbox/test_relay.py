"""What a relay makes of the broker's answers, on a broker that answers as it is told."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError

from celery_eda.brokers.base import CONFIRMED, PublishResult, Verdict
from celery_eda.core.message import Message
from celery_eda.core.settings import Settings
from celery_eda.dead_letters.letter import LetterFilter
from celery_eda.dead_letters.store import DeadLetterStore
from celery_eda.outbox.relay import Relay
from celery_eda.outbox.settlement import RelayResult
from celery_eda.outbox.store import OutboxStore
from tests.support.databases import LOCKING, Database
from tests.support.messages import message
from tests.support.waiting import eventually

REFUSED = PublishResult(Verdict.refused, "312 NO_ROUTE")
UNKNOWN = PublishResult(Verdict.unknown, "no answer in time", is_late=True)
LOST = PublishResult(Verdict.unknown, "connection reset")
DOWN = PublishResult(Verdict.unavailable, "NOT_FOUND - home node is down")

MakeRelay = Callable[..., tuple[Relay, list[str]]]


class ScriptedBroker:
    """Answers each message by its queue, and notes what it was sent, and whether it was closed."""

    def __init__(self, answers: dict[str, PublishResult], sent: list[str]) -> None:
        self.answers = answers
        self.sent = sent

    def publish(self, messages: Sequence[Message]) -> list[PublishResult]:
        self.sent += [each.routing_key for each in messages]
        return [self.answers.get(each.routing_key, CONFIRMED) for each in messages]

    def close(self) -> None:
        self.sent.append("closed")


class PatientBroker(ScriptedBroker):
    """Answers a batch when it is asked to, and may be sent others before."""

    def __init__(self, answers: dict[str, PublishResult], sent: list[str]) -> None:
        super().__init__(answers, sent)
        self.unanswered: deque[list[PublishResult]] = deque()

    def begin(self, messages: Sequence[Message]) -> None:
        self.unanswered.append(self.publish(messages))

    def finish(self) -> list[PublishResult]:
        self.sent.append("answer")
        return self.unanswered.popleft()


@pytest.fixture
def make_relay(database: Database, outbox: OutboxStore, dead_letters: DeadLetterStore) -> MakeRelay:
    def make(
        answers: dict[str, PublishResult],
        kind: type[ScriptedBroker] = ScriptedBroker,
        **settings: object,
    ) -> tuple[Relay, list[str]]:
        sent: list[str] = []
        broker = kind(answers, sent)
        relay = Relay(
            database.engine,
            outbox,
            dead_letters,
            SimpleNamespace(connect=lambda: broker),
            SimpleNamespace(run=lambda prerequisites, identity: None),
            Settings(**settings),  # type: ignore[arg-type]
        )
        return relay, sent

    return make


def store(database: Database, outbox: OutboxStore, *queues: str) -> None:
    with database.engine.begin() as connection:
        outbox.add(connection, [message(routing_key=queue) for queue in queues])


def waiting(database: Database) -> list[tuple[str, int]]:
    columns = database.tables.outbox.c
    with database.engine.connect() as connection:
        rows = connection.execute(select(columns.routing_key, columns.attempts))
        return [(row.routing_key, row.attempts) for row in rows]


def test_only_what_was_confirmed_leaves_the_outbox(
    database: Database, outbox: OutboxStore, make_relay: MakeRelay
) -> None:
    relay, _ = make_relay({"bad": REFUSED, "mute": UNKNOWN})
    store(database, outbox, "good", "bad", "mute", "good")

    assert relay.send() == RelayResult(confirmed=2, refused=1, unknown=1)
    assert sorted(waiting(database)) == [("bad", 1), ("mute", 0)]


def test_what_is_given_up_is_kept_whole_though_only_as_much_was_read_as_is_needed_to_send_it(
    database: Database, outbox: OutboxStore, dead_letters: DeadLetterStore, make_relay: MakeRelay
) -> None:
    relay, _ = make_relay({"bad": REFUSED}, max_attempts=1)
    relay.outbox = replace(outbox, seal=lambda _: b"envelope")
    refused = message(routing_key="bad")
    with database.engine.begin() as connection:
        relay.outbox.add(connection, [refused])

    relay.send()

    with database.engine.connect() as connection:
        (letter,) = dead_letters.select(connection, LetterFilter())
    assert letter.message == refused
    assert waiting(database) == []


def test_what_is_given_up_and_cannot_be_read_whole_rests_and_does_not_hold_up_the_others(
    database: Database, outbox: OutboxStore, make_relay: MakeRelay
) -> None:
    relay, sent = make_relay({"bad": REFUSED}, max_attempts=1)
    relay.outbox = replace(outbox, seal=lambda _: b"envelope")
    store(database, relay.outbox, "bad", "good")
    columns = database.tables.outbox.c
    with database.engine.begin() as connection:
        is_bad = columns.routing_key == "bad"
        connection.execute(update(database.tables.outbox).where(is_bad).values(headers="{"))

    relay.send()
    relay.send()

    with database.engine.connect() as connection:
        why = connection.scalar(select(columns.last_error))
    assert sent == ["bad", "good"]
    assert waiting(database) == [("bad", 1)]
    assert "cannot be read" in (why or "")


def test_a_queue_that_never_confirms_does_not_hold_up_the_others(
    database: Database, outbox: OutboxStore, make_relay: MakeRelay
) -> None:
    relay, sent = make_relay({"mute": UNKNOWN})
    store(database, outbox, "mute", "good")

    relay.send()
    store(database, outbox, "good")
    relay.send()

    assert sent == ["mute", "good", "good"]
    assert waiting(database) == [("mute", 0)]


def test_what_was_on_a_lost_connection_is_sent_again_at_once_though_some_was_confirmed(
    database: Database, outbox: OutboxStore, make_relay: MakeRelay
) -> None:
    relay, sent = make_relay({"lost": LOST})
    store(database, outbox, "good", "lost")

    relay.send()
    relay.send()

    assert sent == ["good", "lost", "lost"]
    assert waiting(database) == [("lost", 0)]


def test_a_queue_that_is_down_is_charged_to_no_message_and_holds_up_no_other(
    database: Database, outbox: OutboxStore, make_relay: MakeRelay
) -> None:
    relay, sent = make_relay({"down": DOWN}, max_attempts=1)
    store(database, outbox, "down", "good")

    assert relay.send() == RelayResult(confirmed=1, refused=1)
    store(database, outbox, "good")
    relay.send()

    assert sent == ["down", "good", "good"]
    assert waiting(database) == [("down", 0)]


def test_a_row_that_cannot_be_read_says_why_and_does_not_hold_up_the_others(
    database: Database, outbox: OutboxStore, make_relay: MakeRelay
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
    database: Database, outbox: OutboxStore, make_relay: MakeRelay
) -> None:
    relay, sent = make_relay({"mute": UNKNOWN})
    store(database, outbox, "mute", "mute")

    relay.send()
    relay.send()

    assert sent == ["mute"] * 4
    assert waiting(database) == [("mute", 0), ("mute", 0)]


def test_a_message_refused_too_often_becomes_a_dead_letter_with_the_brokers_words(
    database: Database, outbox: OutboxStore, make_relay: MakeRelay
) -> None:
    relay, _ = make_relay({"bad": REFUSED}, max_attempts=1)
    store(database, outbox, "bad")

    relay.send()

    columns = database.tables.dead_letters.c
    with database.engine.connect() as connection:
        row = connection.execute(select(columns.reason, columns.error, columns.attempts)).one()
    assert waiting(database) == []
    assert tuple(row) == ("unsendable", "312 NO_ROUTE", 1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (ScriptedBroker, "a b c bad d e f"),
        (PatientBroker, "a b c bad answer d e answer f answer answer"),
    ],
)
def test_the_next_batch_is_sent_before_the_answers_if_the_broker_can_do_that(
    database: Database,
    outbox: OutboxStore,
    make_relay: MakeRelay,
    kind: type[ScriptedBroker],
    expected: str,
) -> None:
    relay, sent = make_relay({"bad": REFUSED}, kind, relay_batch=2)
    store(database, outbox, "a", "b", "c", "bad", "d", "e", "f")

    assert relay.send() == RelayResult(confirmed=6, refused=1)
    assert sent == expected.split()
    assert waiting(database) == [("bad", 1)]


def test_a_batch_that_is_not_full_is_settled_as_soon_as_it_is_answered(
    database: Database, outbox: OutboxStore, make_relay: MakeRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay, sent = make_relay({}, PatientBroker, relay_batch=2)
    store(database, outbox, "a")
    claims: list[int] = []
    claim = OutboxStore.claim

    def noted(self: OutboxStore, *arguments: Any) -> Sequence[Any]:
        claims.append(len(sent))
        return claim(self, *arguments)

    monkeypatch.setattr(OutboxStore, "claim", noted)
    relay.send()

    assert (sent, claims) == (["a", "answer"], [0])


@pytest.mark.parametrize("kind", [ScriptedBroker, PatientBroker])
def test_in_an_outage_nothing_more_is_sent_and_all_is_given_back(
    database: Database, outbox: OutboxStore, make_relay: MakeRelay, kind: type[ScriptedBroker]
) -> None:
    relay, sent = make_relay({"mute": UNKNOWN}, kind, relay_batch=2)
    store(database, outbox, "a", "b", *["mute"] * 6, "c")
    mute = 2 if kind is ScriptedBroker else 4

    assert relay.send() == RelayResult(confirmed=2, unknown=mute)
    assert sent.count("mute") == mute

    other, sent = make_relay({}, relay_batch=9)
    assert other.send() == RelayResult(confirmed=7)
    assert sent == [*["mute"] * 6, "c"]
    assert waiting(database) == []


def test_what_is_committed_late_behind_what_is_being_sent_is_sent_soon(
    database: Database, outbox: OutboxStore, make_relay: MakeRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery_eda.outbox.relay.CHAIN", 3)
    relay, sent = make_relay({}, relay_batch=1)
    with database.engine.connect() as late:
        if database.vendor in LOCKING:  # another one has a single writer
            outbox.add(late, [message(routing_key="late")])
        store(database, outbox, *"abcde")
        monkeypatch.setattr(relay, "_unprepared", lambda pending: late.commit() or {})
        done = [relay.send().confirmed for _ in range(3)]

    expected = ["a", "b", "c", "late", "d", "e"] if database.vendor in LOCKING else [*"abcde"]
    assert sent == expected
    assert done == [3, len(expected) - 3, 0]


def test_what_was_claimed_too_long_ago_to_be_sent_in_time_is_given_back(
    database: Database, outbox: OutboxStore, make_relay: MakeRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowBroker(PatientBroker):
        def finish(self) -> list[PublishResult]:
            time.sleep(0.6)
            return super().finish()

    relay, sent = make_relay({}, SlowBroker, relay_batch=1, claim_timeout=1.0, publish_timeout=0.5)
    store(database, outbox, "a", "b", "c")
    given_back: list[list[str]] = []
    release = OutboxStore.release

    def noted(self: OutboxStore, *arguments: Any) -> None:
        given_back.append(list(sent))
        release(self, *arguments)

    monkeypatch.setattr(OutboxStore, "release", noted)
    done = relay.send() + relay.send()

    assert given_back == [["a", "b", "answer"]]
    assert done == RelayResult(confirmed=3)
    assert [each for each in sent if each != "answer"] == ["a", "b", "c"]


def test_what_is_given_back_and_could_not_be_sent_anyway_rests(
    database: Database, outbox: OutboxStore, make_relay: MakeRelay
) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError("it is away")

    relay, _ = make_relay({"mute": UNKNOWN}, PatientBroker, relay_batch=1)
    relay.backend = SimpleNamespace(run=fail)
    store(database, outbox, "mute", "good")
    with database.engine.begin() as connection:
        outbox.add(connection, [message(prerequisites=(("declare", {}),))])

    relay.send()

    columns = database.tables.outbox.c
    with database.engine.connect() as connection:
        rests = select(columns.last_error).where(columns.available_at.is_not(None))
        (why,) = connection.scalars(rests)
    assert "it is away" in why


def test_what_has_to_precede_a_message_may_take_longer_than_there_is_to_spare(
    database: Database, outbox: OutboxStore, make_relay: MakeRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay, sent = make_relay(
        {}, PatientBroker, relay_batch=2, claim_timeout=1.0, publish_timeout=0.9
    )
    prepared = message(prerequisites=(("declare", {}),), routing_key="prepared")
    with database.engine.begin() as connection:
        outbox.add(connection, [prepared, message(routing_key="good")] * 3)

    def fail(*_: object) -> None:
        time.sleep(0.2)
        raise ConnectionError

    relay.backend = SimpleNamespace(run=fail)
    eventually(lambda: relay.send().claimed == 0)
    assert sent.count("good") == 3
    assert waiting(database) == [("prepared", 0)] * 3


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_database_that_fails_meanwhile_loses_nothing_and_is_told(
    database: Database,
    outbox: OutboxStore,
    make_relay: MakeRelay,
    monkeypatch: pytest.MonkeyPatch,
    failing: int,
) -> None:
    store(database, outbox, *"abcde")
    relay, sent = make_relay({}, PatientBroker, relay_batch=2)
    brief = database.again(claim_timeout=1.0)
    relay.engine, relay.outbox = brief.engine, OutboxStore(brief.tables.outbox, brief.dialect)
    clear, cleared = OutboxStore.clear, []

    def clear_badly(self: OutboxStore, *arguments: Any) -> int:
        cleared.append(clear(self, *arguments))
        if len(cleared) == failing:
            raise OperationalError("DELETE", {}, ConnectionResetError())
        return cleared[-1]

    monkeypatch.setattr(OutboxStore, "clear", clear_badly)
    with pytest.raises(OperationalError):
        relay.send()
    # What is unanswered then must not be taken for the answer to something else.
    assert sent.count("closed") == (failing < 3)
    assert len(waiting(database)) == 7 - 2 * failing

    monkeypatch.undo()
    relay.broker = SimpleNamespace(connect=lambda: PatientBroker({}, sent))
    eventually(lambda: relay.send().claimed == 0 and not waiting(database))
    assert set("abcde") <= set(sent)


def test_a_relay_that_is_stopped_claims_no_more(
    database: Database, outbox: OutboxStore, make_relay: MakeRelay
) -> None:
    relay, sent = make_relay({}, relay_batch=1)
    store(database, outbox, "a", "b")

    relay.stop()

    assert relay.send() == RelayResult(confirmed=1)
    assert sent == ["a"]
