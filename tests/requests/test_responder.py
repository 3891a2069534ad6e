"""What a responder replies, when, and how often: one worker slot without its process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from celery import chain, chord, group
from celery.exceptions import Ignore, Reject
from sqlalchemy import insert

from celery_eda import RetryPolicy
from celery_eda.core import addresses
from celery_eda.core.addresses import REPLY_HEADER, REPLY_TASK
from celery_eda.core.arguments import Arguments
from celery_eda.core.message import Message
from celery_eda.errors import RemoteError
from celery_eda.outbox import result_backend
from celery_eda.requests.outcomes import ErrorOutcome
from tests.support.worker_slot import Slot, unique

ADDRESS = addresses.of_process()


class OutOfStock(Exception):
    """An error of the responder's own."""


def ask(slot: Slot, task: Any, *args: Any, to: str = ADDRESS, **options: Any) -> Message:
    """The request for a call of *task*, as it comes to the responder."""
    headers = {REPLY_HEADER: to}
    task.apply_async(args, task_id=str(uuid4()), headers=headers, ignore_result=True, **options)
    (message,) = slot.sent()
    return message


def replies_to(slot: Slot, request: Message, rounds: int = 12) -> list[Message]:
    """Handle *request* and whatever follows from it; returns the replies."""
    waiting, replies = [request], []
    for _ in range(rounds):
        for each in waiting:
            result_backend.run_prerequisites(slot.app, each.prerequisites, each.identity)
            slot.deliver(each)
        sent = slot.sent()
        replies += [each for each in sent if each.task == REPLY_TASK]
        waiting = [each for each in sent if each.task != REPLY_TASK]
    assert not waiting
    return replies


def outcomes(slot: Slot, request: Message, replies: list[Message]) -> list[Any]:
    """What *replies* to *request* say."""
    said = [slot.eda.requests.reader.outcome_in(list(Arguments.of(each).args)) for each in replies]
    assert {correlation_id for correlation_id, _ in said} <= {request.headers["id"]}
    return [outcome for _, outcome in said]


# ── one reply ───────────────────────────────────────────────────────────────────────────────


def test_a_reply_goes_to_the_address_of_its_request(slot: Slot) -> None:
    @slot.task
    def quote(number: int) -> dict[str, int]:
        slot.write(number)
        return {"price": number}

    request = ask(slot, quote, 7)
    (reply,) = replies_to(slot, request)

    assert (reply.exchange, reply.routing_key, reply.queue) == ("", ADDRESS, None)
    assert outcomes(slot, request, [reply]) == [{"price": 7}]
    assert slot.effects() == [7]


@pytest.mark.parametrize("result", [None, 0, "", [], "a\u2028\U0001f600", {"a": [1.5, None]}])
def test_a_reply_brings_any_result_as_it_was(slot: Slot, result: Any) -> None:
    @slot.task
    def give() -> Any:
        return result

    request = ask(slot, give)

    assert outcomes(slot, request, replies_to(slot, request)) == [result]


def test_nobody_asks_nobody_replies(slot: Slot) -> None:
    @slot.task
    def quote(number: int) -> int:
        return number

    quote.delay(1)

    assert slot.work() == [None]


def test_a_result_that_cannot_be_sent_is_a_failure_and_leaves_no_effect(slot: Slot) -> None:
    @slot.task
    def give(number: int) -> object:
        slot.write(number)
        return object()

    request = ask(slot, give, 1)
    (outcome,) = outcomes(slot, request, replies_to(slot, request))

    assert "EncodeError" in str(outcome.error)
    assert slot.effects() == []
    assert [row.reason for row in slot.dead()] == ["failed"]


def test_what_does_not_commit_does_not_reply(slot: Slot) -> None:
    @slot.task
    def clash(number: int) -> int:
        slot.eda.session.execute(insert(unique).values(number=number))
        return number

    with slot.engine.begin() as connection:
        connection.execute(insert(unique).values(number=1))
    request = ask(slot, clash, 1)
    (outcome,) = outcomes(slot, request, replies_to(slot, request))

    assert isinstance(outcome, ErrorOutcome)
    assert "IntegrityError" in str(outcome.error)


# ── copies ──────────────────────────────────────────────────────────────────────────────────


def test_a_copy_of_a_request_gets_the_same_reply(slot: Slot) -> None:
    calls = []

    @slot.task
    def quote(number: int) -> int:
        calls.append(number)
        return number + len(calls)

    request = ask(slot, quote, 7)
    first = replies_to(slot, request)
    second = replies_to(slot, request)

    assert calls == [7]
    assert outcomes(slot, request, first + second) == [8, 8]
    assert first[0].identity == second[0].identity


def test_a_copy_of_a_request_that_failed_gets_the_same_error(slot: Slot) -> None:
    @slot.task
    def quote(number: int) -> None:
        raise LookupError(f"no {number}")

    request = ask(slot, quote, 7)
    first = replies_to(slot, request)
    slot.deliver(request, redelivered=True)
    second = [each for each in slot.sent() if each.task == REPLY_TASK]
    errors = [each.error for each in outcomes(slot, request, first + second)]

    assert [(type(each), each.args) for each in errors] == [(LookupError, ("no 7",))] * 2
    assert len(slot.dead()) == 1


# ── failures ────────────────────────────────────────────────────────────────────────────────


def failure(slot: Slot, request: Message) -> Exception:
    (outcome,) = outcomes(slot, request, replies_to(slot, request))
    assert isinstance(outcome, ErrorOutcome)
    return outcome.error


def test_an_error_of_python_comes_as_itself_with_what_the_responder_says_of_it(slot: Slot) -> None:
    @slot.task
    def quote() -> None:
        raise ValueError("no such thing", 7)

    error = failure(slot, ask(slot, quote))

    assert type(error) is ValueError
    assert error.args == ("no such thing", 7)
    assert isinstance(error.__cause__, RemoteError)
    assert "in quote" in (error.__cause__.traceback or "")


def test_an_error_that_nobody_registered_comes_as_a_remote_one(slot: Slot) -> None:
    @slot.task
    def quote() -> None:
        raise OutOfStock("no chocolate")

    error = failure(slot, ask(slot, quote))

    assert isinstance(error, RemoteError)
    assert error.type == "tests.requests.test_responder.OutOfStock"
    assert error.message == "no chocolate"
    assert str(error) == "tests.requests.test_responder.OutOfStock: no chocolate"


def test_an_error_that_is_registered_comes_as_itself(slot: Slot) -> None:
    slot.eda.register_error(OutOfStock, "stock.OutOfStock")

    @slot.task
    def quote() -> None:
        raise OutOfStock("no chocolate")

    error = failure(slot, ask(slot, quote))

    assert isinstance(error, OutOfStock)
    assert error.args == ("no chocolate",)


def test_secrets_do_not_travel_with_an_error(slot: Slot) -> None:
    @slot.task
    def pay(password: str) -> None:
        raise ValueError(f"{password} is wrong for postgresql://me:hush@db/shop")

    error = failure(slot, ask(slot, pay, kwargs={"password": "swordfish"}))

    assert "swordfish" not in f"{error.args} {error.__cause__} {vars(error.__cause__)}"
    assert "hush" not in f"{error.args} {error.__cause__} {vars(error.__cause__)}"


def test_a_request_that_is_retried_gets_one_reply_in_the_end(slot: Slot) -> None:
    policy = RetryPolicy(attempts=3, first=0, longest=0, on=(LookupError,))

    @slot.task(bind=True, policy=policy)
    def quote(self: Any, number: int) -> int:
        if self.request.retries < 2:
            raise LookupError("not yet")
        return number

    request = ask(slot, quote, 7)

    assert outcomes(slot, request, replies_to(slot, request)) == [7]


def test_a_request_that_retries_by_itself_gets_one_reply_in_the_end(slot: Slot) -> None:
    @slot.task(bind=True, max_retries=3)
    def quote(self: Any, number: int) -> int:
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return number

    request = ask(slot, quote, 7)

    assert outcomes(slot, request, replies_to(slot, request)) == [7]


def test_a_request_whose_retries_are_exhausted_gets_the_error(slot: Slot) -> None:
    @slot.task(policy=RetryPolicy(attempts=2, first=0, longest=0))
    def quote() -> None:
        raise LookupError("never")

    error = failure(slot, ask(slot, quote))

    assert isinstance(error, LookupError)


@pytest.mark.parametrize("ending", [Ignore("not today"), Reject("never", requeue=False)])
def test_a_request_that_is_given_up_gets_an_error(slot: Slot, ending: Exception) -> None:
    @slot.task
    def quote() -> None:
        raise ending

    error = failure(slot, ask(slot, quote))

    assert type(ending).__name__ in str(error)


def test_a_request_that_comes_too_late_is_not_handled_and_its_sender_hears_of_it(
    slot: Slot,
) -> None:
    @slot.task
    def quote(number: int) -> None:
        slot.write(number)

    request = ask(slot, quote, 7)
    late = replace(request, headers={**request.headers, "eda_verdict": "expired"})
    error = failure(slot, late)

    assert "expired" in str(error)
    assert slot.effects() == []


def test_a_request_that_is_redriven_is_answered_again(slot: Slot) -> None:
    mended = []

    @slot.task
    def quote(number: int) -> int:
        if not mended:
            raise LookupError("not yet")
        return number

    request = ask(slot, quote, 7)
    replies = replies_to(slot, request)
    mended.append(True)
    with slot.engine.begin() as connection:
        letter = slot.eda.dead_letters.store.find(connection, slot.dead()[0].id)
    assert letter is not None
    replies += replies_to(slot, letter.message.revised())

    assert [type(each) for each in outcomes(slot, request, replies)] == [ErrorOutcome, int]
    assert replies[0].identity != replies[1].identity


# ── somebody else answers ───────────────────────────────────────────────────────────────────


@pytest.fixture
def parts(slot: Slot) -> Any:
    @slot.task
    def add(left: int, right: int) -> int:
        return left + right

    @slot.task
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @slot.task
    def fail(*_: Any) -> None:
        raise LookupError("no")

    return {"add": add, "total": total, "fail": fail}


CANVAS = {
    "a task": (lambda each: each["add"].s(1, 2), 3),
    "a chain": (lambda each: chain(each["add"].s(1, 2), each["add"].s(3), each["add"].s(4)), 10),
    "a chord": (
        lambda each: chord([each["add"].s(1, 2), each["add"].s(3, 4)], each["total"].s()),
        10,
    ),
    "a group": (lambda each: group([each["add"].s(1, 2), each["add"].s(3, 4)]), [3, 7]),
    "a chain in a chain": (
        lambda each: chain(each["add"].s(1, 2), chain(each["add"].s(3), each["add"].s(4))),
        10,
    ),
}


@pytest.mark.parametrize("name", CANVAS)
def test_what_replaces_a_task_answers_for_it_once(slot: Slot, parts: Any, name: str) -> None:
    make, result = CANVAS[name]

    @slot.task(bind=True)
    def quote(self: Any) -> Any:
        return self.replace(make(parts))

    request = ask(slot, quote)

    assert outcomes(slot, request, replies_to(slot, request)) == [result]


def test_when_what_replaces_a_task_fails_the_sender_hears_of_it(slot: Slot, parts: Any) -> None:
    @slot.task(bind=True)
    def quote(self: Any) -> Any:
        return self.replace(parts["fail"].s())

    error = failure(slot, ask(slot, quote))

    assert isinstance(error, LookupError)


def test_what_a_task_publishes_does_not_answer_for_it(slot: Slot, parts: Any) -> None:
    @slot.task
    def quote() -> int:
        parts["add"].delay(1, 2)
        chain(parts["add"].s(1, 2), parts["add"].s(3)).delay()
        return 7

    request = ask(slot, quote, link=parts["add"].s(1), link_error=parts["total"].s())

    assert outcomes(slot, request, replies_to(slot, request)) == [7]


# ── addresses ───────────────────────────────────────────────────────────────────────────────

FORGED = [
    *("payments", "", "eda.reply.", "eda.reply.0", "eda.reply." + "g" * 32, "eda.replies."),
    *("eda.reply." + "0" * 33, "eda.reply." + "0" * 32 + ".x", "eda.replies.a\nb", 7, ["x"], {}),
]


@pytest.mark.parametrize("address", FORGED, ids=repr)
def test_nothing_is_sent_to_an_address_that_this_system_does_not_hand_out(
    slot: Slot, address: Any
) -> None:
    @slot.task
    def quote(number: int) -> None:
        slot.write(number)

    request = ask(slot, quote, 7)
    forged = replace(request, headers={**request.headers, REPLY_HEADER: address})

    assert replies_to(slot, forged) == []
    assert [row.reason for row in slot.dead()] == ["malformed"]
    assert slot.effects() == []


def test_addresses_cannot_be_guessed() -> None:
    process = addresses.of_process()

    assert addresses.of_process() != process
    assert addresses.of_request(process) != addresses.of_request(process)
    assert addresses.is_volatile(process)
    assert addresses.is_volatile(addresses.of_request(process))
    assert not addresses.is_volatile(addresses.of_service("shop"))
    assert addresses.is_durable(addresses.of_service("shop"))
