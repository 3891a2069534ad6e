"""A dead letter is treated once, whoever else tries at the same time, and never by halves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Barrier
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection, delete, select
from sqlalchemy.exc import DBAPIError

from celery_eda.core.arguments import Arguments
from celery_eda.core.identity import Lane, Position
from celery_eda.core.message import Message
from celery_eda.databases import message_rows
from celery_eda.dead_letters.audit import Audit, Author
from celery_eda.dead_letters.letter import Letter, Reason
from celery_eda.dead_letters.reduced import HEAD, REDUCED_HEADER, reduced
from celery_eda.dead_letters.repair import Repair, RepairResult, in_order
from celery_eda.dead_letters.store import DeadLetterStore
from celery_eda.errors import NotItsTurn, UnreadableBody
from celery_eda.ordering.cursors import Cursors
from celery_eda.outbox.store import OutboxStore
from celery_eda.outbox.transactions import join
from tests.support.databases import LOCKING, Database
from tests.support.messages import BODY, message
from tests.support.outboxes import stand_in_outbox

ADA = Author("ada", "typo")
BOB = Author("bob")
LANE = Lane("shop", "shop.charge", "account 7")
CONSUMER = "shop.charge"
EPOCH = 1000
EMBEDDED = json.loads(BODY)[2]
ROUNDS = 10


@dataclass
class Desk:
    """Somebody with dead letters to treat.

    Attributes:
        handed_off: ids of outbox rows that the sender was told of.
    """

    database: Database
    dead_letters: DeadLetterStore
    audit: Audit
    cursors: Cursors
    outbox: OutboxStore
    handed_off: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = self.database.engine
        self.store = stand_in_outbox(self.outbox.add, self.handed_off.extend, lambda messages: None)
        self.repair = Repair(self.dead_letters, self.audit, self.cursors)

    def bury(self, letter: Message, consumer: str | None = CONSUMER, **details: Any) -> int:
        """Make *letter* a dead one; it holds its key if it is its turn."""
        details = {"reason": Reason.failed, "error": ValueError("no"), "attempts": 1, **details}
        with self.engine.begin() as connection:
            id = self.dead_letters.add(connection, letter, consumer=consumer, **details)
            if consumer and letter.position:
                revision = letter.identity.revision
                self.cursors.block(connection, consumer, letter.position, revision)
            return id

    def park(self, parked: Message) -> None:
        assert parked.position is not None
        with self.engine.begin() as connection:
            assert self.cursors.park(connection, CONSUMER, parked.position, parked)

    def advance(self, place: Position) -> None:
        """Have the message at *place* take effect."""
        with self.engine.begin() as connection:
            cursor = self.cursors.find(connection, CONSUMER, place.lane)
            self.cursors.advance(connection, CONSUMER, place, cursor)

    def do(self, verb: str, id: int, author: Author = ADA, **options: Any) -> RepairResult:
        """*verb* in a transaction of its own."""
        with self.engine.begin() as connection:
            end: RepairResult = getattr(self.repair, verb)(
                join.join(connection, self.store), id, author, **options
            )
            return end

    def at_once(self, *deeds: Callable[[], Any]) -> list[Any]:
        """What each of *deeds* returns, begun at the same moment; or the error that it raised."""
        together = Barrier(len(deeds))

        def begin(deed: Callable[[], Any]) -> Any:
            together.wait(60)
            try:
                return deed()
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(deeds)) as threads:
            return [each.result(60) for each in [threads.submit(begin, deed) for deed in deeds]]

    def letter(self, id: int) -> Letter:
        with self.engine.connect() as connection:
            letter = self.dead_letters.find(connection, id)
        assert letter is not None
        return letter

    def sent(self) -> list[Message]:
        """Take what waits in the outbox."""
        with self.engine.begin() as connection:
            query = select(self.outbox.table).order_by(self.outbox.table.c.id)
            rows = connection.execute(query).all()
            connection.execute(delete(self.outbox.table))
        return [message_rows.from_row(row) for row in rows]

    def deeds(self, id: int) -> list[tuple[str, str]]:
        """Actor and action of each record of the letter's message."""
        message_id: UUID = self.letter(id).message.identity.id
        with self.engine.connect() as connection:
            entries = self.audit.of_message(connection, message_id)
        return [(each.actor, each.action) for each in entries]


@pytest.fixture
def desk(
    database: Database,
    dead_letters: DeadLetterStore,
    audit: Audit,
    cursors: Cursors,
    outbox: OutboxStore,
) -> Desk:
    return Desk(database, dead_letters, audit, cursors, outbox)


def placed(number: int, **changes: Any) -> Message:
    """The message with this *number* of its key."""
    return message(**changes).at(Position(LANE, EPOCH, number))


def body_of(sent: Message) -> Any:
    return json.loads(sent.body)


# ── redrive ─────────────────────────────────────────────────────────────────────────────────


def test_a_redrive_is_the_next_revision_of_the_same_message_in_its_place(desk: Desk) -> None:
    original = placed(1)
    id = desk.bury(original)

    end = desk.do("redrive", id)
    (sent,) = desk.sent()

    assert end == RepairResult(id, "redriven", fresh=True)
    assert sent.identity == original.identity.next
    assert (sent.position, sent.body) == (original.position, original.body)
    assert sent == original.revised()
    assert desk.letter(id).state == "redriven"
    assert desk.deeds(id) == [("ada", "redrive")]
    assert len(desk.handed_off) == 1


def test_a_second_redrive_does_nothing_and_says_so(desk: Desk) -> None:
    id = desk.bury(message())
    desk.do("redrive", id)
    desk.sent()

    assert desk.do("redrive", id, BOB) == RepairResult(id, "redriven", fresh=False)
    assert desk.sent() == []
    assert desk.deeds(id) == [("ada", "redrive")]


def test_nothing_is_done_to_a_letter_that_is_not_there(desk: Desk) -> None:
    for verb in ("redrive", "edit", "skip", "discard"):
        assert desk.do(verb, 7) == RepairResult(7, None, fresh=False)


@pytest.mark.parametrize("first", ["redrive", "discard"])
@pytest.mark.parametrize("second", ["redrive", "edit", "skip", "discard"])
def test_a_letter_has_one_end(desk: Desk, first: str, second: str) -> None:
    id = desk.bury(message())
    state = desk.do(first, id).state
    desk.sent()

    assert desk.do(second, id) == RepairResult(id, state, fresh=False)
    assert desk.sent() == []
    assert desk.letter(id).state == state


@pytest.mark.parametrize("verb", ["redrive", "edit", "skip", "discard"])
def test_what_is_rolled_back_was_never_done(desk: Desk, verb: str) -> None:
    id = desk.bury(placed(1) if verb == "skip" else message())
    desk.park(placed(2))
    options = {"args": [8]} if verb == "edit" else {}
    before = desk.letter(id)
    with desk.engine.connect() as connection:
        getattr(desk.repair, verb)(join.join(connection, desk.store), id, ADA, **options)
        connection.rollback()

    assert desk.letter(id) == before
    assert (desk.sent(), desk.deeds(id), desk.handed_off) == ([], [], [])
    with desk.engine.connect() as connection:
        assert desk.cursors.find(connection, CONSUMER, LANE).last == 0


def test_a_message_begins_anew(desk: Desk) -> None:
    old = {"retries": 3, "expires": "2020-01-01T00:00:00Z", "own": 1}
    of_the_broker = {"x-death": [{"count": 3}], "x-first-death-queue": "q", "x-delivery-count": 7}
    properties = {"delivery_mode": 2, "expiration": "1000", "eda_others": {}}
    whole = replace(message(), headers={**old, **of_the_broker}, properties=properties)
    desk.do("redrive", desk.bury(whole))
    (sent,) = desk.sent()

    assert sent.headers == {"retries": 0, "expires": None, "own": 1, **sent.identity.headers}
    assert sent.properties == {"delivery_mode": 2}


def test_what_cannot_be_read_is_redriven_as_it_is(desk: Desk) -> None:
    original = message(content_type="application/x-python-serialize", body=b"\x80\x04\x00\xff")
    desk.do("redrive", desk.bury(original))

    assert [each.body for each in desk.sent()] == [original.body]


def test_an_unsendable_message_is_sent_again_in_its_place(desk: Desk) -> None:
    original = placed(3, prerequisites=(("set_chord_size", ["g", 2]),), queue="q")
    desk.do("redrive", desk.bury(original, consumer=None, reason=Reason.unsendable))
    (sent,) = desk.sent()

    assert (sent.identity, sent.position) == (original.identity.next, original.position)
    assert (sent.prerequisites, sent.queue) == (original.prerequisites, "q")


def test_a_correction_goes_with_what_was_to_follow(desk: Desk) -> None:
    original = placed(1, body=b'[[7], {"a": 1}, {"chain": [{"task": "next"}], "chord": null}]')
    id = desk.bury(original)
    new = Arguments((8,), {"a": 2}, Arguments.of(original).embedded)
    desk.do("redrive", id, arguments=new)
    (sent,) = desk.sent()

    assert body_of(sent) == [[8], {"a": 2}, {"chain": [{"task": "next"}], "chord": None}]
    assert (sent.headers["argsrepr"], sent.headers["kwargsrepr"]) == ("(8,)", "{'a': 2}")
    assert (sent.identity, sent.position) == (original.identity.next, original.position)
    assert desk.letter(id).message == original


def test_a_place_that_has_passed_is_given_up_only_when_asked(desk: Desk) -> None:
    id = desk.bury(placed(1), reason=Reason.out_of_sequence)
    desk.advance(Position(LANE, EPOCH, 1))

    with pytest.raises(NotItsTurn, match="out-of-order"):
        desk.do("redrive", id)
    assert desk.letter(id).is_open
    assert desk.do("redrive", id, out_of_order=True).fresh
    (sent,) = desk.sent()

    assert "eda_order" not in sent.headers


def test_a_place_that_has_not_passed_stays_even_when_it_may_go(desk: Desk) -> None:
    desk.do("redrive", desk.bury(placed(1)), out_of_order=True)

    assert [each.position for each in desk.sent()] == [Position(LANE, EPOCH, 1)]


def test_a_place_that_nobody_can_have_written_is_left_out(desk: Desk) -> None:
    desk.do("redrive", desk.bury(message(headers={"eda_order": "first!"})))
    (sent,) = desk.sent()

    assert "eda_order" not in sent.headers


# ── edit ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "body"),
    [
        ({"args": [8]}, [[8], {}, EMBEDDED]),
        ({"kwargs": {"a": "ü"}}, [[7], {"a": "ü"}, EMBEDDED]),
        ({"args": [], "kwargs": {}}, [[], {}, EMBEDDED]),
    ],
)
def test_an_edit_changes_what_it_names_and_the_audit_keeps_the_old(
    desk: Desk, change: dict[str, Any], body: Any
) -> None:
    id = desk.bury(placed(1))
    before = desk.letter(id).message

    assert desk.do("edit", id, **change) == RepairResult(id, "open", fresh=True)
    after = desk.letter(id).message
    desk.do("redrive", id, BOB)
    (sent,) = desk.sent()

    assert body_of(after) == body_of(sent) == body
    assert (after.identity, after.position) == (before.identity, before.position)
    with desk.engine.connect() as connection:
        edit, _ = desk.audit.of_message(connection, before.identity.id)
    assert edit.detail == {"body": before.body.decode()}
    assert desk.deeds(id) == [("ada", "edit"), ("bob", "redrive")]


def test_a_letter_in_reduced_form_is_sent_only_after_its_arguments_were_written_again(
    desk: Desk,
) -> None:
    letter = reduced(message(body=b'[["' + b"x" * 2 * HEAD + b'"], {}, {}]'), "too large")
    id = desk.bury(letter)

    with pytest.raises(UnreadableBody, match="edit --args"):
        desk.do("redrive", id)
    with pytest.raises(UnreadableBody):
        desk.do("edit", id, args=[7])
    desk.do("edit", id, args=[7], kwargs={})
    desk.do("redrive", id)

    (sent,) = desk.sent()
    assert Arguments.of(sent).args == (7,)
    assert REDUCED_HEADER not in sent.headers


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"{}", b"[1]", b"\xff", b'[[], {}, "x"]', b"[" * 100_000, b"[NaN", b"9" * 9999],
    ids=range(9),
)
def test_a_body_that_cannot_be_read_can_be_written_anew(desk: Desk, body: bytes) -> None:
    id = desk.bury(message(body=body), reason=Reason.malformed)

    with pytest.raises(UnreadableBody, match="discard"):
        desk.do("edit", id, args=[8])
    assert desk.do("edit", id, args=[8], kwargs={"a": 1}).fresh

    args, kwargs, embedded = body_of(desk.letter(id).message)
    assert (args, kwargs) == ([8], {"a": 1})
    assert set(embedded.values()) == {None}


KINDS = pytest.mark.parametrize(
    "kind",
    [
        {"content_type": "application/x-python-serialize"},
        {"content_type": ""},
        {"headers": {"compression": "application/x-gzip"}},
    ],
)


@KINDS
def test_a_body_that_was_refused_unread_can_be_written_anew(
    desk: Desk, kind: dict[str, Any]
) -> None:
    id = desk.bury(message(**kind), None, reason=Reason.malformed)
    desk.do("edit", id, args=[8], kwargs={})
    desk.do("redrive", id)
    (sent,) = desk.sent()

    assert (body_of(sent)[:2], sent.content_type) == ([[8], {}], "application/json")
    assert "compression" not in sent.headers


@KINDS
@pytest.mark.parametrize("reason", [Reason.failed, Reason.unsendable])
def test_a_body_of_another_kind_is_not_edited_where_somebody_could_read_it(
    desk: Desk, kind: dict[str, Any], reason: Reason
) -> None:
    consumer = CONSUMER if reason is Reason.failed else None
    id = desk.bury(message(**kind), consumer, reason=reason)
    before = desk.letter(id)

    with pytest.raises(UnreadableBody, match="Redrive the letter as it is"):
        desk.do("edit", id, args=[8], kwargs={})

    assert desk.letter(id) == before


# ── skip and discard ────────────────────────────────────────────────────────────────────────


def test_a_skip_lets_the_next_one_of_the_key_go(desk: Desk) -> None:
    id, second = desk.bury(placed(1)), placed(2)
    desk.park(second)

    assert desk.do("skip", id) == RepairResult(id, "skipped", fresh=True)

    assert [each.identity for each in desk.sent()] == [second.identity]
    with desk.engine.connect() as connection:
        cursor = desk.cursors.find(connection, CONSUMER, LANE)
    assert (cursor.last, cursor.held) == (1, None)
    assert desk.deeds(id) == [("ada", "skip")]


def test_a_skip_of_the_last_one_sends_nothing(desk: Desk) -> None:
    desk.do("skip", desk.bury(placed(1)))

    assert desk.sent() == []


@pytest.mark.parametrize(
    ("letter", "consumer", "why"),
    [
        (message(), CONSUMER, "Discard"),
        (placed(1), CONSUMER, "Discard"),
        (placed(3), CONSUMER, "Redrive or skip"),
        (placed(2), None, "Redrive it once"),
    ],
    ids=["keyless", "past", "later", "never sent"],
)
def test_only_the_letter_that_holds_its_key_is_skipped(
    desk: Desk, letter: Message, consumer: str | None, why: str
) -> None:
    desk.advance(Position(LANE, EPOCH, 1))
    id = desk.bury(letter, consumer, reason=Reason.failed if consumer else Reason.unsendable)

    with pytest.raises(NotItsTurn, match=why):
        desk.do("skip", id)

    assert desk.letter(id).is_open
    assert (desk.sent(), desk.deeds(id)) == ([], [])
    with desk.engine.connect() as connection:
        assert desk.cursors.find(connection, CONSUMER, LANE).last == 1


def test_what_nobody_waits_for_is_discarded(desk: Desk) -> None:
    keyless, past = desk.bury(message()), desk.bury(placed(1))
    desk.advance(Position(LANE, EPOCH, 1))

    for id in (keyless, past):
        assert desk.do("discard", id) == RepairResult(id, "discarded", fresh=True)
        assert desk.deeds(id) == [("ada", "discard")]
    assert desk.sent() == []


@pytest.mark.parametrize(
    ("number", "consumer", "why"),
    [(1, CONSUMER, "Skip it instead"), (2, CONSUMER, "--awaited"), (1, None, "--awaited")],
    ids=["now", "later", "never sent"],
)
def test_what_others_wait_for_is_discarded_only_when_told_so(
    desk: Desk, number: int, consumer: str | None, why: str
) -> None:
    reason = Reason.failed if consumer else Reason.unsendable
    id = desk.bury(placed(number), consumer, reason=reason)

    with pytest.raises(NotItsTurn, match=why):
        desk.do("discard", id)
    assert desk.letter(id).is_open
    if why == "--awaited":
        assert desk.do("discard", id, awaited=True).fresh
    else:
        with pytest.raises(NotItsTurn):
            desk.do("discard", id, awaited=True)


def test_what_was_refused_unread_still_has_its_place(desk: Desk) -> None:
    id = desk.bury(placed(1), None, reason=Reason.malformed)
    desk.park(placed(2))

    with pytest.raises(NotItsTurn, match="Skip"):
        desk.do("discard", id)
    assert desk.do("skip", id).fresh
    assert [each.position for each in desk.sent()] == [Position(LANE, EPOCH, 2)]


# ── races ───────────────────────────────────────────────────────────────────────────────────


def test_of_redrives_at_once_one_sends(desk: Desk) -> None:
    for _ in range(ROUNDS):
        id = desk.bury(message())
        ends = desk.at_once(*[lambda id=id: desk.do("redrive", id)] * 4)

        assert sorted(end.fresh for end in ends) == [False, False, False, True]
        assert {end.state for end in ends} == {"redriven"}
        assert len(desk.sent()) == 1
        assert desk.deeds(id) == [("ada", "redrive")]


def test_an_edit_and_a_redrive_at_once_are_one_after_the_other(desk: Desk) -> None:
    for _ in range(ROUNDS):
        id = desk.bury(message())
        edit, redrive = desk.at_once(
            lambda id=id: desk.do("edit", id, args=[8]), lambda id=id: desk.do("redrive", id)
        )
        (sent,) = desk.sent()

        assert redrive.fresh
        assert body_of(sent)[0] == ([8] if edit.fresh else [7])
        assert body_of(desk.letter(id).message) == body_of(sent)
        assert len(desk.deeds(id)) == 1 + edit.fresh


def test_of_a_skip_and_a_redrive_at_once_one_wins(desk: Desk) -> None:
    for number in range(1, 2 * ROUNDS, 2):
        head, second = placed(number), placed(number + 1)
        id = desk.bury(head)
        desk.park(second)
        skip, redrive = desk.at_once(
            lambda id=id: desk.do("skip", id), lambda id=id: desk.do("redrive", id)
        )
        sent = [each.identity for each in desk.sent()]

        assert (skip.fresh, redrive.fresh) in ((True, False), (False, True))
        assert sent == [second.identity if skip.fresh else head.identity.next]
        assert len(desk.deeds(id)) == 1
        if redrive.fresh:
            desk.advance(Position(LANE, EPOCH, number))
        desk.advance(Position(LANE, EPOCH, number + 1))


@pytest.mark.parametrize("database", LOCKING, indirect=True)
def test_who_looked_before_another_redrove_sends_nothing(desk: Desk) -> None:
    id = desk.bury(message())

    def redrive_late() -> RepairResult:
        engine = desk.engine.execution_options(isolation_level="REPEATABLE READ")
        with engine.begin() as connection:
            assert desk.dead_letters.find(connection, id)
            desk.do("redrive", id)
            return desk.repair.redrive(join.join(connection, desk.store), id, BOB)

    (end,) = desk.at_once(redrive_late)

    # PostgreSQL says so; MariaDB shows what has become of the letter.
    assert isinstance(end, DBAPIError) or not end.fresh
    assert len(desk.sent()) == 1


def test_a_skip_while_the_key_moves_on_is_refused(desk: Desk) -> None:
    id = desk.bury(placed(1))

    class Overtaken(Cursors):
        def find(self, connection: Connection, consumer: str, lane: Lane) -> Any:
            cursor = super().find(connection, consumer, lane)
            return replace(cursor, last=cursor.last - 1) if cursor.written else cursor

    overtaken = Overtaken(desk.cursors.table, desk.cursors.parked, desk.database.dialect)
    desk.repair = replace(desk.repair, cursors=overtaken)
    desk.advance(Position(LANE, EPOCH, 1))

    with pytest.raises(NotItsTurn, match="decide again"):
        desk.do("skip", id)
    assert desk.letter(id).is_open


# ── many ────────────────────────────────────────────────────────────────────────────────────


def test_letters_of_one_key_are_treated_in_its_order(desk: Desk) -> None:
    numbers = [3, None, 1, 2, None]
    ids = [desk.bury(message() if n is None else placed(n)) for n in numbers]
    letters: Sequence[Letter] = [desk.letter(each) for each in reversed(ids)]

    ordered = [each.id for each in in_order(letters)]

    assert ordered == [ids[2], ids[3], ids[0], ids[1], ids[4]]
