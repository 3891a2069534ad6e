"""A failed message is handed to its repairer, whose answer takes effect once, or to a person.

Each message comes out of the outbox as the relay would send it, and is given to the function that
Celery's pools call.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from sqlalchemy import select

from celery_eda import Failure
from celery_eda.core.message import Message
from celery_eda.dead_letters.audit import AuditEntry, Author
from celery_eda.dead_letters.failure import RepairDecision
from celery_eda.dead_letters.letter import Letter
from celery_eda.errors import ConfigurationError, NoDelivery
from celery_eda.outbox.transactions import join
from tests.faults.programs.tables import effects
from tests.support.worker_slot import Slot

ADA = Author("ada")
PLANTED = "hunter2-Zq9"


class BadAmount(ValueError):
    """What a repairer can mend."""


@pytest.fixture
def charge(slot: Slot) -> Any:
    """A task that takes effect with its amount, unless that is no whole number."""

    @slot.task(name="charge", key="account")
    def charge(account: str, amount: Any, note: str = "") -> None:
        slot.write(99)
        if note:
            raise KeyError(note)
        if not isinstance(amount, int):
            raise BadAmount(f"no whole number: {amount}")
        slot.write(amount)

    return charge


def letters(slot: Slot, **which: Any) -> list[Any]:
    return [row for row in slot.dead() if all(getattr(row, k) == v for k, v in which.items())]


def deeds(slot: Slot) -> list[tuple[str, str, str]]:
    """Actor, action and reason of everything in the audit."""
    columns = slot.database.tables.audit.c
    with slot.engine.connect() as connection:
        query = select(columns.actor, columns.action, columns.why).order_by(columns.id)
        return [tuple(row) for row in connection.execute(query)]


def amounts(slot: Slot) -> list[int]:
    return [each for each in slot.effects() if each != 99]


def test_a_repair_is_published_with_the_dead_letter(slot: Slot, charge: Any) -> None:
    @slot.eda.repairs(charge, on=BadAmount)
    def mend(failure: Failure) -> RepairDecision:
        return failure.resubmit(amount=1)

    charge.delay("a", "1.2")
    (message,) = slot.sent()
    assert isinstance(slot.deliver(message), BadAmount)
    (repair,) = slot.sent()

    (letter,) = letters(slot)
    assert (repair.task, repair.routing_key) == (
        "charge.repair",
        f"eda.repair.{slot.app.main}",
    )
    assert repair.body.startswith(b"[[%d], {}" % letter.id)
    assert repair.headers["parent_id"] == message.headers["id"]


def test_a_correction_takes_effect_in_the_place_of_what_failed(slot: Slot, charge: Any) -> None:
    @slot.eda.repairs(charge, on=BadAmount)
    def mend(failure: Failure) -> RepairDecision:
        slot.write(50)
        return failure.resubmit(amount=round(float(failure.arguments["amount"]))).because("rounded")

    for amount in (1, "2.2", 3, 4):
        charge.delay("a", amount)
    first, bad, *others = slot.sent()
    for each in (first, bad, *others):
        slot.deliver(each)
    (repair,) = slot.sent()
    assert slot.deliver(repair) is None
    (mended,) = slot.sent()
    assert mended.identity == bad.identity.next
    slot.deliver(mended)
    slot.work()

    assert amounts(slot) == [1, 2, 3, 4, 50]
    assert deeds(slot) == [("charge.repair", "repair", "rounded")]
    assert [each.state for each in letters(slot)] == ["redriven"]


def test_a_repairer_sees_everything_about_the_failure(slot: Slot, charge: Any) -> None:
    seen: list[Failure] = []

    @slot.eda.repairs(charge)
    def mend(failure: Failure) -> RepairDecision:
        seen.append(failure)
        return failure.resubmit(note=f"try {len(seen)}")

    charge.delay("a", 7, note="try 0")
    (message,) = slot.sent()
    slot.deliver(message)
    slot.work()

    first, second = seen[:2]
    assert (first.args, first.kwargs) == (("a", 7), {"note": "try 0"})
    assert first.arguments == {"account": "a", "amount": 7, "note": "try 0"}
    assert (first.error_type, first.error, first.reason) == ("KeyError", "'try 0'", "failed")
    assert "in charge" in (first.traceback or "")
    assert (first.task, first.key, first.attempts) == ("charge", "a", 1)
    assert first.message_id == second.message_id == message.identity.id
    assert first.history == ()
    (letter, entry) = second.history
    assert isinstance(letter, Letter)
    assert isinstance(entry, AuditEntry)
    assert (letter.id, letter.error) == (first.letter_id, "'try 0'")
    assert (entry.action, entry.dead_letter) == ("repair", first.letter_id)
    assert first.first_at == second.first_at


def test_a_repairer_without_end_gives_way_to_a_person(slot: Slot, charge: Any) -> None:
    calls = []

    @slot.eda.repairs(charge)
    def mend(failure: Failure) -> RepairDecision:
        calls.append(1)
        return failure.resubmit()

    charge.delay("a", "bad")
    slot.work()

    assert len(calls) == 3
    assert [each[1] for each in deeds(slot)] == ["repair"] * 3 + ["leave"]
    assert deeds(slot)[-1] == ("charge.repair", "leave", "3 repairs did not help")
    assert [each.state for each in letters(slot)] == ["redriven"] * 3 + ["open"]


@pytest.mark.parametrize(
    ("on", "called"),
    [
        (BadAmount, True),
        (ValueError, True),
        (Exception, True),
        ((KeyError, BadAmount), True),
        (KeyError, False),
        ((), False),
    ],
)
def test_a_repairer_gets_the_errors_it_takes_on(
    slot: Slot, charge: Any, on: Any, called: bool
) -> None:
    slot.eda.repairs(charge, on=on)(lambda failure: None)
    charge.delay("a", "bad")
    (message,) = slot.sent()
    slot.deliver(message)

    assert slot.waiting() == ["charge.repair"] * called


def test_the_first_repairer_that_takes_an_error_on_gets_it(slot: Slot, charge: Any) -> None:
    slot.eda.repairs("charge", on=KeyError, name="first")(lambda failure: None)
    slot.eda.repairs(charge, name="second")(lambda failure: None)
    slot.eda.repairs(charge, name="third", queue="own")(lambda failure: None)
    charge.delay("a", "bad")
    (message,) = slot.sent()
    slot.deliver(message)

    assert slot.waiting() == ["second"]


def test_two_repairers_of_one_name_are_refused(slot: Slot, charge: Any) -> None:
    slot.eda.repairs(charge)(lambda failure: None)

    with pytest.raises(ConfigurationError, match="name="):
        slot.eda.repairs("charge", on=KeyError)


def test_a_repair_task_may_have_a_queue_of_its_own(slot: Slot, charge: Any) -> None:
    slot.eda.repairs(charge, queue="own")(lambda failure: None)
    charge.delay("a", "bad")
    (message,) = slot.sent()
    slot.deliver(message)

    assert [each.routing_key for each in slot.sent()] == ["own"]


@pytest.mark.parametrize("answer", ["leave", "None"])
def test_what_is_left_stays_open_and_holds_its_key(slot: Slot, charge: Any, answer: str) -> None:
    @slot.eda.repairs(charge)
    def mend(failure: Failure) -> RepairDecision:
        return failure.leave("odd") if answer == "leave" else None

    charge.delay("a", "bad")
    charge.delay("a", 2)
    slot.work()

    assert amounts(slot) == []
    assert [each.state for each in letters(slot)] == ["open"]
    assert deeds(slot) == [("charge.repair", "leave", "odd" if answer == "leave" else "")]


def test_a_repairer_may_skip(slot: Slot, charge: Any) -> None:
    @slot.eda.repairs(charge)
    def mend(failure: Failure) -> RepairDecision:
        return failure.skip("nobody needs it")

    for amount in ("bad", 2, 3):
        charge.delay("a", amount)
    slot.work()

    assert amounts(slot) == [2, 3]
    assert [each.state for each in letters(slot)] == ["skipped"]
    assert deeds(slot) == [("charge.repair", "skip", "nobody needs it")]


def test_a_repairer_that_fails_is_a_dead_letter_and_the_failed_one_stays(
    slot: Slot, charge: Any
) -> None:
    @slot.eda.repairs(charge)
    def mend(failure: Failure) -> RepairDecision:
        slot.write(50)
        raise LookupError("no idea")

    charge.delay("a", "bad")
    slot.work()

    assert [(each.task, each.state) for each in slot.dead()] == [
        ("charge", "open"),
        ("charge.repair", "open"),
    ]
    assert slot.effects() == []
    assert deeds(slot) == []


@pytest.mark.parametrize("answer", ["yes", 7, True])
def test_an_answer_that_is_none_is_a_failure_of_the_repairer(
    slot: Slot, charge: Any, answer: Any
) -> None:
    slot.eda.repairs(charge)(lambda failure: answer)
    charge.delay("a", "bad")
    slot.work()

    (letter,) = letters(slot, task="charge.repair")
    assert "failure.resubmit" in letter.error
    assert letters(slot, task="charge")[0].state == "open"


@pytest.mark.parametrize(
    ("args", "corrections", "body"),
    [
        ((), {"amount": 2}, [["a", 2], {"note": "x"}]),
        (("b",), {}, [["b", "bad"], {"note": "x"}]),
        (("b", 2), {"note": ""}, [["b", 2], {"note": ""}]),
    ],
)
def test_corrections_go_where_the_arguments_were(
    slot: Slot, charge: Any, args: Any, corrections: Any, body: Any
) -> None:
    slot.eda.repairs(charge)(lambda failure: failure.resubmit(*args, **corrections))
    charge.delay("a", "bad", note="x")
    (message,) = slot.sent()
    slot.deliver(message)
    (repair,) = slot.sent()
    slot.deliver(repair)
    (mended,) = slot.sent()

    assert _arguments(mended) == body


def test_a_correction_that_the_task_does_not_take_is_not_sent(slot: Slot, charge: Any) -> None:
    slot.eda.repairs(charge)(lambda failure: failure.resubmit(amuont=2))
    charge.delay("a", "bad")
    slot.work()

    (letter,) = letters(slot, task="charge.repair")
    assert letter.error_type == "TypeError"


def test_a_copy_of_a_repair_repairs_nothing_twice(slot: Slot, charge: Any) -> None:
    slot.eda.repairs(charge)(lambda failure: failure.resubmit(amount=2))
    charge.delay("a", "bad")
    (message,) = slot.sent()
    slot.deliver(message)
    (repair,) = slot.sent()
    for _ in range(3):
        slot.deliver(repair)

    assert slot.waiting() == ["charge"]
    slot.work()
    assert amounts(slot) == [2]


def test_a_letter_that_somebody_treated_meanwhile_is_left_alone(slot: Slot, charge: Any) -> None:
    slot.eda.repairs(charge)(lambda failure: failure.resubmit(amount=2))
    charge.delay("a", "bad")
    (message,) = slot.sent()
    slot.deliver(message)
    (repair,) = slot.sent()
    with slot.engine.begin() as connection:
        slot.eda.dead_letters.repair.skip(
            join.join(connection, slot.eda.outbox), slot.dead()[0].id, ADA
        )

    assert slot.deliver(repair) is None
    assert slot.waiting() == []
    assert deeds(slot) == [("ada", "skip", "")]


@pytest.mark.parametrize("how", ["edit", "redrive"])
def test_a_letter_that_somebody_treats_while_its_repairer_thinks_is_theirs(
    slot: Slot, charge: Any, how: str
) -> None:
    @slot.eda.repairs(charge)
    def mend(failure: Failure) -> RepairDecision:
        options = {"args": ["a", 9]} if how == "edit" else {}
        with slot.engine.begin() as connection:
            transaction = join.join(connection, slot.eda.outbox)
            getattr(slot.eda.dead_letters.repair, how)(
                transaction, failure.letter_id, ADA, **options
            )
        return failure.leave("odd") if how == "redrive" else failure.resubmit(amount=2)

    charge.delay("a", "bad")
    (message,) = slot.sent()
    slot.deliver(message)
    (repair,) = slot.sent()
    slot.deliver(repair)

    expected = [("ada", how, "")]
    if how == "edit":
        expected.append(("charge.repair", "leave", "it was edited meanwhile"))
    assert deeds(slot) == expected
    assert len(slot.waiting()) == (how == "redrive")


@pytest.mark.parametrize(("verb", "effects"), [("redrive", [1, 2, 3]), ("skip", [1, 3])])
def test_a_failed_first_message_of_an_epoch_can_be_treated(
    slot: Slot, verb: str, effects: list[int]
) -> None:
    mended = []

    @slot.task(name="trade", key="account")
    def trade(account: str, number: int) -> None:
        if number == 2 and not mended:
            raise ValueError(number)
        slot.write(number)

    trade.delay("a", 1)
    slot.work()
    with slot.engine.begin() as connection:
        slot.eda.ordering.sequences.begin_epoch(connection)
    trade.delay("a", 2)
    trade.delay("a", 3)
    slot.work()
    mended.append(True)
    with slot.engine.begin() as connection:
        transaction = join.join(connection, slot.eda.outbox)
        getattr(slot.eda.dead_letters.repair, verb)(transaction, slot.dead()[0].id, ADA)
    slot.work()

    assert slot.effects() == effects


def test_a_failed_message_that_was_let_past_is_repaired_out_of_order(slot: Slot) -> None:
    @slot.task(name="trade", key="account", when_dead="skip")
    def trade(account: str, amount: Any) -> None:
        slot.write(amount + 0)

    slot.eda.repairs(trade)(lambda failure: failure.resubmit(amount=1))
    for amount in ("bad", 2):
        trade.delay("a", amount)
    slot.work()

    assert amounts(slot) == [1, 2]


def test_a_repairer_may_use_the_session_and_be_asynchronous(slot: Slot, charge: Any) -> None:
    @slot.eda.repairs(charge)
    async def mend(session: Any, failure: Failure) -> RepairDecision:
        session.execute(effects.insert().values(name="mend", number=50))
        return failure.resubmit(amount=2)

    charge.delay("a", "bad")
    slot.work()

    assert amounts(slot) == [2, 50]


def test_a_repair_task_outside_a_worker_says_what_is_missing(slot: Slot, charge: Any) -> None:
    mend = slot.eda.repairs(charge)(lambda failure: None)

    with pytest.raises(NoDelivery):
        mend(7)


def test_what_is_no_json_is_left_to_a_person(slot: Slot) -> None:
    slot.app.conf.accept_content = ["json", "pickle"]

    @slot.task(name="heavy", serializer="pickle")
    def heavy(number: int) -> None:
        raise ValueError("no")

    slot.eda.repairs(heavy)(lambda failure: failure.resubmit(1))
    heavy.delay(7)
    slot.work()

    (deed,) = deeds(slot)
    assert deed[:2] == ("heavy.repair", "leave")
    assert "pickle" in deed[2] or "python-serialize" in deed[2]


def test_a_repair_that_cannot_be_published_costs_no_dead_letter(slot: Slot, charge: Any) -> None:
    slot.eda.repairs(charge, queue="forgetful")(lambda failure: None)
    slot.app.conf.task_queues = {"celery": {"exchange": "celery"}, "forgetful": {"no_ack": True}}
    slot.app.amqp.__dict__.pop("queues", None)
    charge.apply_async(("a", "bad"), queue="celery")
    (message,) = slot.sent()

    assert isinstance(slot.deliver(message), BadAmount)
    assert len(slot.dead()) == 1
    assert slot.waiting() == []


def test_no_secret_of_a_failed_message_is_logged(
    slot: Slot, caplog: pytest.LogCaptureFixture
) -> None:
    @slot.task(name="login")
    def login(user: str, password: str, *, url: str, api_key: str = "") -> None:
        raise ValueError(f"{password} is not welcome at {url} with {api_key}")

    login.delay("ada", f"{PLANTED}-1", url=f"amqp://u:{PLANTED}-2@h", api_key=f"{PLANTED}-3")
    # caplog's handler is at the root, which Celery's logger does not reach in every test.
    logging.getLogger("celery.app.trace").addHandler(caplog.handler)
    try:
        assert isinstance(slot.work()[0], ValueError)
    finally:
        logging.getLogger("celery.app.trace").removeHandler(caplog.handler)

    (letter,) = slot.dead()
    assert "is not welcome" in caplog.text
    for text in (caplog.text, letter.error, letter.traceback):
        assert PLANTED not in text


def _arguments(message: Message) -> Any:
    return json.loads(message.body)[:2]
