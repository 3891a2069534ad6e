"""A payload made of an envelope is the one that kombu makes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from kombu import Producer
from kombu.transport.redis import Channel
from kombu.utils.json import dumps

from celery_eda.brokers.base import publish_with
from celery_eda.brokers.rabbitmq import envelopes as rabbitmq
from celery_eda.brokers.redis.envelopes import EnvelopeTemplate, Payloads, encode_envelope
from celery_eda.core.message import Encoded, Message
from tests.support.letters import letter


class Silent(Channel):
    """Kombu's channel, with no server: it keeps what it would push."""

    body_encoding = "base64"
    connection = None

    def __init__(self) -> None:
        self.tags = 0
        self.pushed: list[tuple[str, bytes]] = []
        self._expires: dict[str, int] = {}

    def __del__(self) -> None: ...

    def _next_delivery_tag(self) -> str:
        self.tags += 1
        return f"tag {self.tags}"

    def _put(self, queue: str, message: Mapping[str, Any], **_: Any) -> None:
        key = self._q_for_pri(queue, self._get_message_priority(message))
        self.pushed.append((key, dumps(message).encode()))


def sealed(message: Message, envelope: bytes | None = None) -> Message:
    return message.with_encoded(Encoded("", "", envelope or encode_envelope(message)))


def by_kombu(message: Message) -> tuple[str, bytes]:
    """The list, and the payload with the tag that ours has."""
    channel = Silent()
    publish_with(Producer(channel), message)
    [(key, payload)] = channel.pushed
    return key, payload.replace(b'"tag 1"', b'"tag 1.1"')


values = some.none() | some.booleans() | some.integers(-1, 12) | some.text(max_size=5)
properties_of_any_kind = some.dictionaries(
    some.sampled_from(["priority", "delivery_mode", "app_id", "type"]), values
)


@given(
    properties_of_any_kind,
    some.dictionaries(some.text(max_size=5), values | some.lists(values)),
    some.binary(max_size=20),
    some.sampled_from(["application/json", "application/x-yaml", ""]),
    some.sampled_from(["letters", 'ü "1"']),
)
def test_a_payload_is_the_one_that_kombu_makes(
    properties: dict[str, Any],
    headers: dict[str, Any],
    body: bytes,
    content_type: str,
    queue: str,
) -> None:
    properties = {**properties, "delivery_mode": 2}
    message = replace(
        letter(queue, headers=headers, **properties), body=body, content_type=content_type
    )

    assert Payloads(Silent()).of(sealed(message)) == by_kombu(message)


@given(some.text(), some.text())
def test_an_envelope_made_by_a_template_is_that_of_the_message(header: str, other: str) -> None:
    first = letter(headers={"id": "<its id>"}, reply_to="<its address>")
    template = EnvelopeTemplate(first, encode_envelope(first) or b"", ["id"], ["reply_to"])
    second = replace(
        first,
        headers={**first.headers, "id": header},
        properties={**first.properties, "reply_to": other},
    )

    assert template.filled({"id": header, "reply_to": other, "more": "x"}) == encode_envelope(
        second
    )


def test_what_does_not_stand_out_is_no_template() -> None:
    twice = letter(headers={"id": "1", "shadow": "1"})

    with pytest.raises(ValueError, match="no slot of its own"):
        EnvelopeTemplate(twice, encode_envelope(twice) or b"", ["id"], [])


@pytest.mark.parametrize(
    "message",
    [letter(exchange="orders"), letter(headers={"bad": object()})],
    ids=["through an exchange", "that cannot be encoded"],
)
def test_a_message_has_no_envelope(message: Message) -> None:
    assert encode_envelope(message) is None


def test_without_an_envelope_the_payload_is_made_by_kombu() -> None:
    assert Payloads(Silent()).of(letter()) is None


def test_an_envelope_for_rabbitmq_is_no_payload() -> None:
    message = letter()

    assert Payloads(Silent()).of(sealed(message, rabbitmq.encode_envelope(message))) is None


def test_an_envelope_for_redis_is_nothing_for_rabbitmq() -> None:
    message = letter()
    by_envelope, anew = rabbitmq.Frames(1, 2**17), rabbitmq.Frames(1, 2**17)
    by_envelope.add(sealed(message, encode_envelope(message)))
    anew.add(message)

    assert by_envelope.take() == anew.take()


def test_where_kombu_encodes_bodies_in_another_way_it_makes_the_payloads() -> None:
    channel = Silent()
    channel.body_encoding = "utf-8"

    assert Payloads(channel).of(sealed(letter())) is None


def test_a_queue_that_expires_is_left_to_kombu_who_gives_it_time() -> None:
    channel = Silent()
    payloads = Payloads(channel)
    assert payloads.of(sealed(letter()))
    channel._expires["letters"] = 1000

    assert payloads.of(sealed(letter())) is None


def test_no_two_deliveries_have_the_same_tag() -> None:
    channel = Silent()
    payloads = [Payloads(channel), Payloads(channel)]
    made = [payloads[number % 2].of(sealed(letter())) for number in range(6)]

    tags = [json.loads(each[1])["properties"]["delivery_tag"] for each in made if each]
    assert len(set(tags)) == 6


def test_the_priority_chooses_the_list() -> None:
    payloads = Payloads(Silent())
    made = [payloads.of(sealed(letter(priority=each))) for each in (None, 3, 9, 12)]

    assert [each and each[0] for each in made] == [
        "letters",
        "letters\x06\x163",
        "letters\x06\x169",
        "letters\x06\x169",
    ]
