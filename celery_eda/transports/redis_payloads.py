"""What kombu puts into a list of Redis: of messages that are alike, only what differs is made anew.

Kombu encodes a message as one JSON text. Its headers are in the outbox as JSON already; the rest is
the same from message to message, but for the body and three ids. So the first message of a kind is
kombu's own, and becomes a template for the next ones.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from celery_eda.message import Message
from celery_eda.template import Template

#: Properties that differ from message to message.
IDS = ("correlation_id", "reply_to")
#: Types of properties of which equal ones are encoded alike.
PLAIN = frozenset((str, int, float, bool, type(None)))
#: Kinds of messages to remember.
MOST_KINDS = 1000


class Payloads:
    """The payloads of messages to queues of one of kombu's channels."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        #: The list that messages of a kind go into, and what makes their payloads.
        self._known: dict[Any, tuple[str, Template[str]]] = {}

    def of(self, message: Message) -> tuple[str, str] | None:
        """The list that *message* goes into, and its payload; None if kombu has to make it."""
        if (found := self._known.get(_kind(message))) is None:
            return None
        key, template = found
        return key, template.filled(self._places(message, self._channel._next_delivery_tag()))

    def learn(self, message: Message, key: str, payload: str) -> None:
        """Make the next ones as kombu has made this *payload*, for the list *key*."""
        if (kind := _kind(message)) is None or len(self._known) >= MOST_KINDS:
            return
        tag = json.loads(payload)["properties"]["delivery_tag"]
        with suppress(ValueError):  # what differs does not stand out in this one
            self._known[kind] = key, Template(payload, self._places(message, tag))

    def _places(self, message: Message, tag: str) -> dict[str, str]:
        """What differs in the payload of a message, each with its name in front."""
        assert message.encoded is not None, "it has a kind"
        body, _ = self._channel.encode_body(message.body, self._channel.body_encoding)
        values = {
            "body": json.dumps(body),
            "headers": message.encoded.headers,
            "delivery_tag": json.dumps(tag),
            **{name: json.dumps(message.properties[name]) for name in IDS},
        }
        return {name: f'"{name}": {value}' for name, value in values.items()}


def _kind(message: Message) -> Any:
    """What messages that are alike have in common; None if there are no others like this one."""
    if message.exchange or message.encoded is None:
        return None
    rest = dict(message.properties)
    if not all(type(rest.pop(name, None)) is str for name in IDS):
        return None
    # By their types too, since True is equal to 1.
    types = tuple(map(type, rest.values()))
    if not PLAIN.issuperset(types):
        return None
    route = (message.routing_key, message.content_type, message.content_encoding)
    return (*route, *rest.items(), *types)
