"""Frames from RabbitMQ that py-amqp cannot read, without a broker."""

from __future__ import annotations

from base64 import b64decode
from struct import pack
from types import SimpleNamespace
from typing import Any

import pytest

from celery_eda.brokers.rabbitmq.consume import tolerant
from celery_eda.core.message import UNREADABLE
from tests.faults.programs.hostile_messages import unreadable_octets

DELIVER = pack(">HH", 60, 60)
OCTETS = unreadable_octets()


def frames(octets: bytes, body: bytes) -> list[tuple[int, int, bytes]]:
    header = pack(">HHQ", 60, 0, len(body)) + octets
    return [(1, 1, DELIVER), (2, 1, header), *([(3, 1, body)] if body else [])]


@pytest.mark.parametrize("body", [b"", b"body"])
@pytest.mark.parametrize("name", OCTETS)
def test_unreadable_properties_come_as_they_are_in_a_header(name: str, body: bytes) -> None:
    received: list[Any] = []
    read = tolerant(SimpleNamespace(bytes_recv=0), lambda *frame: received.append(frame[-1]))

    for frame in frames(OCTETS[name], body) + frames(pack(">H", 0x1000) + b"\2", b"next"):
        read(frame)

    strange, following = received
    why, octets = strange.properties["application_headers"][UNREADABLE]
    assert b64decode(octets) == OCTETS[name]
    assert "in the properties" in why
    assert strange.body == (body or "")
    assert following.properties == {"delivery_mode": 2}


def test_what_the_receiver_of_a_message_raises_is_its_own() -> None:
    def fall(*_: Any) -> None:
        raise LookupError

    read = tolerant(SimpleNamespace(bytes_recv=0), fall)
    method, header = frames(pack(">H", 0x1000) + b"\2", b"")
    read(method)

    with pytest.raises(LookupError):
        read(header)
