"""Every answer of the broker counts for the message it was given for, and for no other."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from amqp.exceptions import ChannelError, UnexpectedFrame

from celery_eda.brokers.base import PublishResult
from celery_eda.brokers.rabbitmq.confirms import InFlight
from celery_eda.core.message import Message
from tests.support.letters import letter


class Air:
    """A flight of some messages on a fresh channel, whose tags are 1, 2, 3…"""

    def __init__(self, *messages: Message) -> None:
        self.answers: dict[int, PublishResult] = {}
        self.in_flight = InFlight(count(1), self.answers)
        for position, message in enumerate(messages):
            self.in_flight.add(position, message)

    @property
    def verdicts(self) -> dict[int, str]:
        """What is answered, by position."""
        return {position: answer.verdict.value for position, answer in self.answers.items()}


def returned(message: Message) -> tuple[ChannelError, str, str, Any]:
    """What py-amqp says when *message* comes back."""
    error = ChannelError("NO_ROUTE", reply_code=312)
    return (
        error,
        message.exchange,
        message.routing_key,
        SimpleNamespace(headers=dict(message.headers)),
    )


def test_a_confirm_counts_for_its_tag_alone() -> None:
    air = Air(*[letter() for _ in range(4)])

    air.in_flight.ack(3, False)

    assert air.verdicts == {2: "confirmed"}
    assert [number for number, _ in air.in_flight.messages] == [0, 1, 3]


def test_a_multiple_confirm_counts_for_all_tags_up_to_it() -> None:
    air = Air(*[letter() for _ in range(5)])

    air.in_flight.ack(2, False)
    air.in_flight.ack(4, True)

    assert air.verdicts == dict.fromkeys([0, 1, 2, 3], "confirmed")
    assert [number for number, _ in air.in_flight.messages] == [4]


def test_confirms_may_come_in_any_order() -> None:
    air = Air(*[letter() for _ in range(6)])

    air.in_flight.ack(6, False)
    air.in_flight.nack(2, False)
    air.in_flight.ack(1, False)
    air.in_flight.nack(4, True)
    air.in_flight.ack(5, True)

    assert air.verdicts == {
        0: "confirmed",
        1: "refused",
        2: "refused",
        3: "refused",
        4: "confirmed",
        5: "confirmed",
    }
    assert not air.in_flight


def test_a_late_confirm_of_an_earlier_batch_counts_for_nothing() -> None:
    tags, answers = count(1), {}
    InFlight(tags, {}).add(0, letter())
    flight = InFlight(tags, answers)
    flight.add(0, letter())

    flight.ack(1, False)
    flight.ack(1, True)

    assert answers == {}


def test_a_confirm_that_comes_twice_counts_once() -> None:
    air = Air(letter(), letter())

    air.in_flight.ack(1, False)
    air.in_flight.nack(1, False)

    assert air.verdicts == {0: "confirmed"}


def test_a_returned_message_is_refused_though_its_confirm_follows() -> None:
    batch = [letter(), letter(), letter()]
    air = Air(*batch)

    air.in_flight.on_return(*returned(batch[1]))
    air.in_flight.ack(3, True)

    assert air.verdicts == {0: "confirmed", 1: "refused", 2: "confirmed"}
    assert air.answers[1].why == "312 NO_ROUTE: exchange='' routing_key='letters'"


def test_a_return_does_not_settle_anything_by_itself() -> None:
    sent = letter()
    air = Air(sent)

    air.in_flight.on_return(*returned(sent))

    assert air.verdicts == {}
    assert air.in_flight.messages == [(0, sent)]


def test_several_returns_may_precede_one_confirm() -> None:
    batch = [letter() for _ in range(5)]
    air = Air(*batch)

    air.in_flight.on_return(*returned(batch[1]))
    air.in_flight.on_return(*returned(batch[3]))
    air.in_flight.ack(5, True)

    assert [air.verdicts[position] for position in range(5)] == [
        "confirmed",
        "refused",
        "confirmed",
        "refused",
        "confirmed",
    ]


def test_the_next_revision_of_a_message_is_another_message() -> None:
    first = letter()
    second = letter(identity=first.identity.next)
    air = Air(first, second)

    air.in_flight.on_return(*returned(second))
    air.in_flight.ack(2, True)

    assert air.verdicts == {0: "confirmed", 1: "refused"}


def test_the_same_message_to_another_address_is_another_message() -> None:
    first = letter()
    second = letter("others", identity=first.identity)
    air = Air(first, second)

    air.in_flight.on_return(*returned(second))
    air.in_flight.ack(2, True)

    assert air.verdicts == {0: "confirmed", 1: "refused"}


def test_of_two_that_look_the_same_neither_counts_as_delivered_when_one_comes_back() -> None:
    twin = letter()
    air = Air(twin, letter(), twin)

    air.in_flight.on_return(*returned(twin))
    air.in_flight.ack(3, True)

    assert air.verdicts == {0: "refused", 1: "confirmed", 2: "refused"}


def test_a_return_of_something_that_is_not_under_way_is_an_error() -> None:
    air = Air(letter())

    with pytest.raises(UnexpectedFrame, match="not in flight"):
        air.in_flight.on_return(*returned(letter()))
