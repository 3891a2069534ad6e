"""Messages of one key take effect in the order of their commits, however they come."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from celery.exceptions import Ignore, Reject, Retry
from sqlalchemy import delete, event, insert, select, update

from celery_eda.core.identity import Position
from celery_eda.core.message import Message
from celery_eda.errors import ConfigurationError, InvalidKey, OutOfSequence
from tests.faults.programs.tables import effects
from tests.support.worker_slot import Slot


@pytest.fixture
def lanes(slot: Slot) -> Any:
    """A task whose calls are in order per account; account "b" can be made to fail."""

    @slot.task(name="trade", key="account", bind=True, max_retries=2)
    def trade(self: Any, session: Any, account: str, number: int, how: str = "") -> int:
        session.execute(insert(effects).values(name=account, number=number))
        if how == "retry" and self.request.retries < 2:
            raise self.retry(countdown=0)
        if how == "ignore":
            raise Ignore
        if how == "fail":
            raise ValueError(f"no {number}")
        return number

    return trade


def in_order_of_effect(slot: Slot, account: str) -> list[int]:
    query = select(effects.c.number).where(effects.c.name == account).order_by(effects.c.id)
    with slot.engine.connect() as connection:
        return list(connection.scalars(query))


def position(message: Message) -> Position:
    found = Position.of_headers(message.headers)
    assert found is not None
    return found


def count(slot: Slot, table: str) -> int:
    with slot.engine.connect() as connection:
        return len(connection.execute(select(getattr(slot.database.tables, table))).all())


# ── whatever the order of arrival ───────────────────────────────────────────────────────────


def test_four_messages_in_any_order_take_effect_in_theirs(slot: Slot, lanes: Any) -> None:
    for arrival in itertools.permutations(range(4)):
        account = "".join(map(str, arrival))
        for number in range(4):
            lanes.delay(account, number)
        messages = slot.sent()

        for place in arrival:
            slot.deliver(messages[place])
        slot.work()

        assert in_order_of_effect(slot, account) == [0, 1, 2, 3]
        assert count(slot, "parked") == 0


def test_shuffled_messages_and_copies_of_many_keys_take_effect_once_and_in_order(
    slot: Slot, lanes: Any
) -> None:
    chance = random.Random(7)
    for number in range(60):
        lanes.delay(chance.choice("abc"), number, chance.choice(["", "", "", "retry"]))
    messages = slot.sent()
    on_the_wire = [*messages, *chance.sample(messages, 20)]
    chance.shuffle(on_the_wire)

    for _ in range(400):
        if not on_the_wire:
            break
        slot.deliver(on_the_wire.pop(0))
        more = slot.sent()
        on_the_wire += more + more[: chance.choice([0, 0, 1])]
        chance.shuffle(on_the_wire)

    for account in "abc":
        seen = in_order_of_effect(slot, account)
        assert seen == sorted(seen)
    assert Counter(slot.effects()) == Counter(range(60))
    assert count(slot, "parked") == 0
    assert slot.dead() == []


def test_without_the_cursor_they_take_effect_as_they_come(
    slot: Slot, lanes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        lanes.delay("a", number)
    monkeypatch.setattr(Position, "of_headers", lambda _: None)

    for message in reversed(slot.sent()):
        slot.deliver(message)

    assert in_order_of_effect(slot, "a") == [2, 1, 0]


# ── the head ────────────────────────────────────────────────────────────────────────────────


def test_a_retry_keeps_its_place_and_the_others_wait(slot: Slot, lanes: Any) -> None:
    lanes.delay("a", 1, "retry")
    lanes.delay("a", 2)
    first, second = slot.sent()

    assert isinstance(slot.deliver(first), Retry)
    (again,) = slot.sent()
    assert isinstance(slot.deliver(second), Ignore)

    assert position(again) == position(first)
    slot.deliver(again)
    slot.work()
    assert in_order_of_effect(slot, "a") == [1, 2]


def test_a_message_that_fails_for_good_holds_its_key_and_no_other(slot: Slot, lanes: Any) -> None:
    lanes.delay("a", 1, "fail")
    for number in (2, 3):
        lanes.delay("a", number)
        lanes.delay("b", number)

    slot.work()

    assert in_order_of_effect(slot, "a") == []
    assert in_order_of_effect(slot, "b") == [2, 3]
    assert [letter.reason for letter in slot.dead()] == ["failed"]
    assert count(slot, "parked") == 2


def test_the_next_revision_of_a_failed_message_frees_its_key(slot: Slot, lanes: Any) -> None:
    lanes.delay("a", 1, "fail")
    lanes.delay("a", 2)
    failed, second = slot.sent()
    slot.deliver(failed)
    slot.deliver(second)
    repaired = failed.revised(body=b'[["a", 1], {}, {}]')

    slot.deliver(repaired)
    slot.deliver(repaired)
    slot.work()

    assert in_order_of_effect(slot, "a") == [1, 2]


def test_a_copy_of_a_failed_message_changes_nothing(slot: Slot, lanes: Any) -> None:
    lanes.delay("a", 1, "fail")
    (failed,) = slot.sent()
    slot.deliver(failed)

    assert isinstance(slot.deliver(failed), Ignore)
    assert len(slot.dead()) == 1


def test_a_task_may_have_its_failed_messages_skipped(slot: Slot) -> None:
    @slot.task(key="account", when_dead="skip")
    def count_up(session: Any, account: str, number: int) -> None:
        if number == 1:
            raise ValueError("one too few")
        slot.write(number)

    for number in (1, 2):
        count_up.delay("a", number)
    first, second = slot.sent()

    slot.deliver(second)
    slot.deliver(first)
    slot.work()

    assert slot.effects() == [2]
    assert len(slot.dead()) == 1


def test_a_message_that_its_handler_gives_up_is_not_waited_for(slot: Slot, lanes: Any) -> None:
    lanes.delay("a", 1, "ignore")
    lanes.delay("a", 2)

    slot.work()

    assert in_order_of_effect(slot, "a")[-1] == 2


def test_a_message_that_comes_after_its_place_was_taken_is_a_dead_letter(
    slot: Slot, lanes: Any
) -> None:
    lanes.delay("a", 1)
    (message,) = slot.sent()
    slot.deliver(message)
    with slot.engine.begin() as connection:
        connection.execute(delete(slot.database.tables.inbox))

    assert isinstance(slot.deliver(message), OutOfSequence)
    assert in_order_of_effect(slot, "a") == [1]
    assert [letter.reason for letter in slot.dead()] == ["out of sequence"]


def test_a_handler_that_publishes_in_order_does_so_with_its_commit(slot: Slot, lanes: Any) -> None:
    @slot.task(key=lambda account: account)
    def forward(session: Any, account: str) -> None:
        for number in (1, 2):
            lanes.delay(account, number)

    for account in "ab":
        forward.delay(account)

    slot.work()

    assert in_order_of_effect(slot, "a") == [1, 2]
    assert in_order_of_effect(slot, "b") == [1, 2]


# ── where the key comes from ────────────────────────────────────────────────────────────────


def test_a_key_is_a_parameter_a_function_or_said_by_the_caller(slot: Slot, lanes: Any) -> None:
    @slot.task(key=lambda row, **_: row["id"])
    def by_function(row: dict[str, int], note: str = "") -> None: ...

    @slot.task(key="id")
    def by_default(id: int = 5) -> None: ...

    account = UUID(int=7)
    lanes.delay(number=1, account="keyword")
    by_function.delay({"id": 7}, note="x")
    by_default.delay()
    lanes.apply_async(("a", 1), key="said")
    with slot.eda.transaction():
        slot.app.send_task("elsewhere.task", (1,), key=account)
        lanes.s("a", 1).set(key="canvas").delay()

    lanes_of = [position(message).lane for message in slot.sent()]

    assert [lane.key for lane in lanes_of] == [
        *("keyword", "7", "5", "said", str(account), "canvas"),
    ]
    assert {lane.source for lane in lanes_of} == {slot.app.main}
    assert lanes_of[4].scope == "elsewhere.task"


@pytest.mark.parametrize("key", ["", 1.5, [1], "k" * 256, "é" * 128, "line\nbreak"])
def test_what_cannot_be_a_key_is_refused_where_it_is_published(
    slot: Slot, lanes: Any, key: Any
) -> None:
    with pytest.raises(InvalidKey):
        lanes.apply_async(("a", 1), key=key)

    assert slot.sent() == []


def test_a_key_that_names_no_parameter_is_refused_where_it_is_written(slot: Slot) -> None:
    with pytest.raises(InvalidKey, match="'acount' names no parameter"):

        @slot.task(key="acount")
        def trade(account: str) -> None: ...


def test_what_to_do_with_failed_messages_must_be_known(slot: Slot) -> None:
    with pytest.raises(ConfigurationError, match="when_dead"):

        @slot.task(key="account", when_dead="wait")
        def trade(account: str) -> None: ...


def test_a_service_without_a_name_cannot_publish_in_order(slot: Slot, lanes: Any) -> None:
    slot.app.main = None

    with pytest.raises(ConfigurationError, match="eda_service"):
        lanes.delay("a", 1)


def test_a_message_without_a_number_takes_effect_as_it_comes(slot: Slot, lanes: Any) -> None:
    """Another publisher, or beat, does not know of the order."""
    lanes.delay("a", 1)
    lanes.delay("a", 2)
    messages = slot.sent()
    headers = {k: v for k, v in messages[1].headers.items() if k != "eda_order"}
    foreign = replace(messages[1], headers=headers)

    slot.deliver(foreign)

    assert in_order_of_effect(slot, "a") == [2]


def test_a_message_without_a_key_reads_and_writes_no_cursor(slot: Slot) -> None:
    @slot.task
    def plain(session: Any) -> None: ...

    plain.delay()
    (message,) = slot.sent()
    statements: list[str] = []
    event.listen(slot.engine, "before_cursor_execute", lambda *a: statements.append(a[2]))

    slot.deliver(message)

    assert statements
    assert not [each for each in statements if "cursors" in each or "sequences" in each]


@pytest.mark.parametrize(
    "header",
    [
        1,
        [],
        {"a": 1},
        ["shop", "trade", "a", 0, 1],
        ["shop", "trade", "a", 1, -1],
        ["shop", "trade", "a", 1, 2**63],
        ["shop", "trade", "a", 2**62, 1],
        ["shop", "trade", 7, 1, 1],
        ["shop", "trade", "a", 1, 1, 1],
        ["shop", "trade", "a", 1, 1, "x", 1],
        ["shop", "trade", "a" * 300, 1, 1],
    ],
)
def test_a_malformed_place_is_a_dead_letter(slot: Slot, lanes: Any, header: Any) -> None:
    lanes.delay("a", 1)
    (message,) = slot.sent()
    forged = replace(message, headers={**message.headers, "eda_order": header})

    assert isinstance(slot.deliver(forged), ValueError)
    assert [letter.reason for letter in slot.dead()] == ["malformed"]
    assert in_order_of_effect(slot, "a") == []


def test_a_handler_whose_turn_is_taken_while_it_runs_has_no_effect(slot: Slot, lanes: Any) -> None:
    """The compare-and-set: without it the effect would come after that of its successor."""
    if slot.database.vendor == "sqlite":
        pytest.skip("one writer: nobody moves the cursor while a handler writes")

    @slot.task(key="account")
    def overtaken(session: Any, account: str, number: int) -> None:
        slot.write(number)
        with slot.engine.begin() as operator:
            operator.execute(update(slot.database.tables.cursors).values(last=number))

    overtaken.delay("a", 1)
    overtaken.delay("a", 2)
    first, _ = slot.sent()
    place = position(first)
    with slot.engine.begin() as connection:
        slot.eda.ordering.cursors.lock(connection, "overtaken", place.lane)
        connection.execute(update(slot.database.tables.cursors).values(epoch=place.epoch))

    assert isinstance(slot.deliver(first), Reject)
    assert slot.effects() == []
    assert isinstance(slot.deliver(first), OutOfSequence)
