"""Errors and events that came from somebody else mean nothing of their own to a consumer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from celery.exceptions import MaxRetriesExceededError

from celery_eda.core.event import Event
from celery_eda.core.identity import ORDER_HEADER
from celery_eda.errors import OutOfSequence, PublishingForbidden, RemoteError, Unwanted
from celery_eda.requests import RemoteErrors
from tests.support.worker_slot import Slot


@pytest.mark.parametrize(
    "error", [Unwanted("neither"), Unwanted("revoked"), OutOfSequence("late")], ids=repr
)
def test_an_error_of_this_package_that_a_handler_raises_is_one_like_any_other(
    slot: Slot, error: Exception
) -> None:
    @slot.task
    def ask(number: int) -> None:
        raise error

    ask.delay(1)
    slot.work()

    assert [(row.reason, row.error_type) for row in slot.dead()] == [
        ("failed", type(error).__qualname__)
    ]


@pytest.mark.parametrize("kind", [MaxRetriesExceededError, PublishingForbidden])
def test_a_responder_that_gave_up_does_not_decide_for_the_policy_of_the_requester(
    slot: Slot, kind: type[Exception]
) -> None:
    errors = RemoteErrors()

    @slot.task(policy=lambda attempts, error: 0.0 if attempts < 3 else None)
    def ask(number: int) -> None:
        raise errors.from_wire(errors.to_wire(kind("no more")))

    ask.delay(1)
    slot.work()

    assert [row.reason for row in slot.dead()] == ["retries exhausted"]


def test_an_error_that_cannot_be_printed_arrives_as_a_remote_one() -> None:
    described = {
        "type": "SyntaxError",
        "args": ["m", ["f", 1, "x", "text"]],
        "message": "m",
        "traceback": None,
    }

    assert isinstance(RemoteErrors().from_wire(described), RemoteError)


@pytest.mark.parametrize("place", range(3))
def test_an_event_at_the_position_of_another_stream_is_a_dead_letter(
    slot: Slot, place: int
) -> None:
    handled = []

    @slot.eda.on("order.*", name="copy", ordered=True)
    def copy(event: Event) -> None:
        handled.append(event.key)

    slot.eda.emit("order.placed", {}, key="victim")
    (event,) = slot.sent()
    order = list(event.headers[ORDER_HEADER])
    order[place] = "another"
    headers = {**event.headers, "task": "copy", ORDER_HEADER: order}
    slot.deliver(replace(event, task="copy", headers=headers))

    assert handled == []
    assert [(row.reason, row.error_type) for row in slot.dead()] == [("failed", "InvalidEvent")]


def test_the_position_of_a_message_is_over_with_its_handling(slot: Slot) -> None:
    handled = []

    @slot.eda.on("order.*", name="copy", ordered=True)
    def copy(event: Event) -> None:
        handled.append(event.key)

    slot.eda.emit("order.placed", {}, key="first")
    (event,) = slot.sent()
    slot.deliver(replace(event, task="copy", headers={**event.headers, "task": "copy"}))
    copy.apply((slot.eda.emit("order.placed", {}, key="second").to_cloud(),))

    assert handled == ["first", "second"]
