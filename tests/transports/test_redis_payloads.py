"""A payload made by a template is the one that kombu makes."""

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

from celery_eda.message import Message
from celery_eda.outbox import Outbox
from celery_eda.transports.base import publish_with
from celery_eda.transports.redis_payloads import Payloads
from tests.transports.letters import letter


class Silent(Channel):
    """Kombu's channel, with no server: it keeps the payload that it would push."""

    body_encoding = "base64"
    connection = None

    def __init__(self) -> None:
        self.tags = 0
        self.pushed: list[str] = []

    def __del__(self) -> None: ...

    def _next_delivery_tag(self) -> str:
        self.tags += 1
        return f"tag {self.tags}"

    def _put(self, queue: str, message: Mapping[str, Any], **_: Any) -> None:
        self.pushed.append(dumps(message))


def encoded(message: Message) -> Message:
    return message.knowing(Outbox.encode(Outbox(None, None), message))  # type: ignore[arg-type]


def by_kombu(channel: Silent, message: Message) -> str:
    publish_with(Producer(channel), message)
    return channel.pushed[-1]


def different(number: int, message: Message) -> Message:
    """Another message of the same kind."""
    ids = {"correlation_id": f"ü {number}", "reply_to": f'"{number}"'}
    headers = {"id": number, "argsrepr": '"body": "%s"', **message.headers}
    properties = {**message.properties, **ids}
    return encoded(replace(message, body=b"%d" % number, headers=headers, properties=properties))


values = some.none() | some.booleans() | some.integers(0, 9) | some.text(max_size=5)


@given(
    some.dictionaries(some.sampled_from(["priority", "delivery_mode", "app_id", "type"]), values),
    some.dictionaries(some.text(max_size=5), values | some.lists(values)),
    some.binary(max_size=20),
)
def test_a_payload_is_the_one_that_kombu_makes(
    properties: dict[str, Any], headers: dict[str, Any], body: bytes
) -> None:
    properties = {**properties, "delivery_mode": 2, "priority": properties.get("priority") and 3}
    first = different(1, letter(headers=headers, **properties))
    second = encoded(replace(different(2, first), body=body))
    channel, beside = Silent(), Silent()
    payloads = Payloads(channel)
    assert payloads.of(first) is None
    payloads.learn(first, "queue", by_kombu(channel, first))

    made = payloads.of(second)

    by_kombu(beside, first)
    assert made == ("queue", by_kombu(beside, second))


OTHERS: dict[str, dict[str, Any]] = {
    "to another queue": {"routing_key": "elsewhere"},
    "through an exchange": {"exchange": "orders"},
    "of another type": {"content_type": "application/x-yaml"},
    "of another encoding": {"content_encoding": "binary"},
    "with another priority": {"properties": {"priority": 2}},
    "with a priority of another type": {"properties": {"priority": True}},
    "with one property more": {"properties": {"more": "of them"}},
    "with one that is no text": {"properties": {"more": ["unlike", "others"]}},
    "without an address for results": {"properties": {"reply_to": None}},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS.keys())
def test_a_message_of_another_kind_is_kombus_own(changes: dict[str, Any]) -> None:
    first = different(1, letter(priority=1))
    channel = Silent()
    payloads = Payloads(channel)
    payload = by_kombu(channel, first)
    payloads.learn(first, "queue", payload)
    properties = {**first.properties, **changes.get("properties", {})}

    assert payloads.of(first) == ("queue", payload.replace('"tag 1"', '"tag 2"'))
    assert payloads.of(encoded(replace(first, **{**changes, "properties": properties}))) is None


def test_what_does_not_stand_out_is_not_learned() -> None:
    message = encoded(letter(headers={"x": 1}, correlation_id="1", reply_to="2"))
    channel = Silent()
    payloads = Payloads(channel)
    twice = json.loads(by_kombu(channel, message))
    twice["properties"]["again"] = {"reply_to": "2"}

    payloads.learn(message, "queue", json.dumps(twice))

    assert payloads.of(message) is None
