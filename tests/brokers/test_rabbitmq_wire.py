"""What goes over the wire to RabbitMQ is what Celery itself would have sent, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from amqp import Message as AMQPMessage
from amqp.exceptions import ContentTooLarge, FrameSyntaxError
from amqp.method_framing import frame_writer
from amqp.serialization import dumps
from amqp.spec import Basic
from hypothesis import given
from hypothesis import strategies as some
from kombu import Producer
from kombu.transport.pyamqp import Channel

from celery_eda.brokers.base import publish_with
from celery_eda.brokers.rabbitmq.envelopes import Frames, encode_envelope
from celery_eda.core.message import Encoded, Message
from tests.support.letters import letter

CHANNEL = 7
FRAME_MAX = 131_072

LETTERS = {
    "a plain task": letter(),
    "through an exchange": letter("orders", exchange="events", routing_key="order.placed"),
    "urgent and short-lived": letter(priority=9, expiration=1.5, delivery_mode=1),
    "with all properties": letter(
        message_id="m",
        timestamp=1_700_000_000,
        type="t",
        user_id="guest",
        app_id="a",
        cluster_id="c",
        priority=0,
    ),
    "without delivery mode": Message(
        **{
            **vars(letter()),
            "properties": {"correlation_id": "1", "reply_to": None},
            "content_encoding": "binary",
        }
    ),
    "with headers of every kind": letter(
        headers={
            "text": "ü€😀",
            "half a character": "\ud800",
            "long": "x" * 70_000,
            "bytes": b"\x00\xff",
            "numbers": [0, 1, True, False, -1, 2**31, -(2**31), 2**62, 0.5, Decimal("12.34")],
            "one": 1,
            "true": True,
            "one point nought": 1.0,
            "time": datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc),
            "nothing": None,
            "tree": {"a": {"b": [{"c": [None, []]}, (1, 2)]}, "empty": {}},
        }
    ),
    "stamped": letter(
        headers={"stamps": {"batch": ["7"]}, "stamped_headers": ["batch"], "timelimit": [9, 3.5]}
    ),
    "with an empty body": letter(body=b""),
    "as large as a frame": letter(body=b"x" * (FRAME_MAX - 8)),
    "larger than a frame": letter(body=b"x" * (FRAME_MAX - 7)),
    "of many frames": letter(body=bytes(range(256)) * 3_000),
    "to be handed over at once": letter(immediate=True),
}


class Reference:
    """A channel that writes what kombu's producer and py-amqp make of a message."""

    def __init__(self) -> None:
        self.written = bytearray()
        connection = SimpleNamespace(frame_max=FRAME_MAX, bytes_sent=0)
        self._write = frame_writer(connection, SimpleNamespace(write=self.written.extend))

    def prepare_message(self, *arguments: Any) -> AMQPMessage:
        return Channel.prepare_message(None, *arguments)

    def basic_publish(
        self, message: AMQPMessage, exchange: str, routing_key: str, immediate: bool, **_: Any
    ) -> None:
        mandatory = True
        arguments = dumps("Bssbb", (0, exchange, routing_key, mandatory, immediate))
        self._write(1, CHANNEL, Basic.Publish, arguments, message)


def by_py_amqp(message: Message) -> bytes:
    reference = Reference()
    publish_with(Producer(reference), message)
    return bytes(reference.written)


def by_us(*messages: Message) -> bytes:
    frames = Frames(CHANNEL, FRAME_MAX)
    for message in messages:
        frames.add(message)
    return bytes(frames.take())


def in_envelope(message: Message) -> bytes:
    """What is written of a message whose headers were encoded when it was captured."""
    sealed = message.with_encoded(Encoded("", "", encode_envelope(message)))
    return by_us(sealed if sealed.envelope is None else blank(sealed))


def blank(message: Message) -> Message:
    """*message* with nothing to encode but its envelope."""
    return replace(message, headers={}, properties={}).with_encoded(
        Encoded("", "", message.envelope)
    )


@pytest.mark.parametrize("message", LETTERS.values(), ids=LETTERS.keys())
def test_the_frames_are_those_of_kombu_and_py_amqp(message: Message) -> None:
    assert by_us(message) == by_py_amqp(message)
    assert in_envelope(message) == by_py_amqp(message)


def test_the_frames_of_a_batch_are_those_of_its_messages_one_after_the_other() -> None:
    batch = list(LETTERS.values())

    assert by_us(*batch, *batch) == b"".join(map(by_py_amqp, batch + batch))


headers = some.recursive(
    some.none()
    | some.booleans()
    | some.integers(-(2**63) + 1, 2**63 - 1)
    | some.floats(allow_nan=False)
    | some.text(some.characters(codec=None), max_size=30),
    lambda inner: (
        some.lists(inner, max_size=4) | some.dictionaries(some.text(max_size=20), inner, max_size=4)
    ),
)


@given(some.dictionaries(some.text(max_size=50), headers, max_size=8))
def test_any_headers_are_encoded_as_py_amqp_does(found: dict[str, Any]) -> None:
    message = letter(headers=found)

    assert by_us(message) == by_py_amqp(message)
    assert in_envelope(message) == by_py_amqp(message)


def test_only_what_an_envelope_cannot_say_has_none() -> None:
    cannot = letter(immediate=True), letter(headers={"bad": object()})

    assert [encode_envelope(each) for each in cannot] == [None, None]
    assert all(encode_envelope(each) for name, each in LETTERS.items() if "handed over" not in name)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (letter(headers={"bad": object()}), FrameSyntaxError),
        (letter(headers={"x" * 256: 1}), Exception),
        (letter(routing_key="x" * 256), Exception),
        (letter(headers={"bad": 2**64}), Exception),
        (letter(priority=300), Exception),
        (letter(headers={"long": "x" * FRAME_MAX}), ContentTooLarge),
    ],
    ids=["an object", "a long name", "a long key", "a large number", "a priority", "long headers"],
)
def test_what_cannot_be_encoded_leaves_no_trace_in_the_batch(
    message: Message, error: type[Exception]
) -> None:
    frames, neighbour = Frames(CHANNEL, FRAME_MAX), letter()
    frames.add(neighbour)

    with pytest.raises(error):
        frames.add(message)

    assert bytes(frames.take()) == by_py_amqp(neighbour)


def test_the_size_is_that_of_the_frames_not_taken_yet() -> None:
    frames = Frames(CHANNEL, FRAME_MAX)
    frames.add(letter())
    frames.add(letter())

    size, taken, rest = frames.size, frames.take(), frames.size

    assert size == len(taken)
    assert rest == 0
