"""Hostile messages, and a hand that puts them into a queue as they are.

Each carries its own name in a header, or in its body, so that its dead letter can be found.
"""

from __future__ import annotations

import bz2
import functools
import json
import lzma
import os
import pickle
import uuid
import zlib
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from struct import pack
from typing import Any

from kombu import Connection

JSON = "application/json"
CALL = b'[[1], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
#: What the worker under fault may decompress, and what the bombs hold.
MOST = 4 * 2**20
BOMB = 96 * 2**20


@dataclass(frozen=True)
class Letter:
    """What comes over the wire.

    Attributes:
        reason: that of the dead letter it has to become.
        stored: the body of that, if it is not the one that was sent.
    """

    name: str
    reason: str = "malformed"
    body: bytes = CALL
    headers: dict[str, Any] = field(default_factory=dict)
    properties: dict[str, Any] = field(default_factory=dict)
    content_type: Any = JSON
    content_encoding: Any = "utf-8"
    stored: bytes | None = None
    task: Any = "road.charge"

    @property
    def all_headers(self) -> dict[str, Any]:
        usual = {"task": self.task, "id": f"id of {self.name}", "lang": "py", "x-case": self.name}
        return {**usual, **self.headers}


class Trap:
    """An object that touches a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


WRONG_HEADERS: dict[str, tuple[Any, ...]] = {
    "task": ({"a": 1}, ["x"], 5, True, "x" * 5000),
    "id": ({"a": 1}, 7, "", "x" * 5000, "a\r\nforged line", "\x1b[31mred", "\ud800"),
    "root_id": ({"a": 1}, "x" * 5000),
    "parent_id": (["x"],),
    "group": ({"a": 1},),
    "shadow": ({"a": 1}, "a\r\nforged line"),
    "lang": ({"a": 1},),
    "origin": (["x"],),
    "argsrepr": ({"a": 1}, 5),
    "kwargsrepr": (["x"],),
    "eta": ("not-a-date", "9999-12-31T23:59:59+00:00", 5, {"a": 1}, "0001-01-01T00:00:00"),
    "expires": ("not-a-date", ["x"], "9999-12-31T23:59:59-12:00"),
    "timelimit": ("x", [1], [1, 2, 3], [-1, None], ["x", None], {"a": 1}, [2**60, 1]),
    "retries": (-1, "x", 2**40, {"a": 1}, 2**31 - 1),
    "replaced_task_nesting": ("x", -1),
    "group_index": ("x",),
    "stamped_headers": ("x", [1]),
    "stamps": (["x"],),
    "ignore_result": ("x",),
    "chord": ("x", {"a": 1}),
    "chain": ("x",),
    "get": ("hides a method",),
    "update": (1,),
    "eda_id": ("no uuid", 5, "x" * 5000),
    "eda_revision": (-1, "x", 2**31 - 1),
    "eda_reply_to": ("payments", 7, "eda.reply.x", "eda.replies.", "eda.replies.\ud800"),
    "eda_order": (
        "x",
        ["a", "b", "c", -1, 1],
        [1, 2, 3, 4, 5],
        ["nul\0", "b", "c", 1, 1],
        ["a", "nul\0", "c", 1, 1],
        ["a", "b", "nul\0", 1, 1],
        ["\ud800", "b", "c", 1, 1],
        ["a", "b", "\ud800", 1, 1],
        ["é" * 200, "b", "c", 1, 1],
        ["a", "b", "é" * 200, 1, 1],
    ),
}

BODIES: dict[str, tuple[bytes, str]] = {
    "null": (b"null", "malformed"),
    "empty": (b"", "malformed"),
    "a number": (b"5", "malformed"),
    "a text": (b'"args"', "malformed"),
    "an object": (b'{"a": 1}', "malformed"),
    "protocol 1": (b'{"task": "road.charge", "id": "1", "args": [1], "kwargs": {}}', "malformed"),
    "hybrid": (b'{"args": [1], "kwargs": {}}', "malformed"),
    "one element": (b"[[1]]", "malformed"),
    "four elements": (b"[[1], {}, {}, {}]", "malformed"),
    "args an object": (b'[{"a": 1}, {}, {}]', "malformed"),
    "args a text": (b'["args", {}, {}]', "malformed"),
    "kwargs a list": (b"[[1], [2], {}]", "malformed"),
    "embedded a list": (b"[[1], {}, [1]]", "malformed"),
    "embedded forged": (b'[[1], {}, {"is_eager": true}]', "malformed"),
    "embedded another id": (b'[[1], {}, {"id": "another"}]', "malformed"),
    "chord a text": (b'[[1], {}, {"chord": "x"}]', "malformed"),
    "chain of numbers": (b'[[1], {}, {"chain": [1, 2]}]', "malformed"),
    "callbacks a text": (b'[[1], {}, {"callbacks": "x"}]', "malformed"),
    "errback without a task": (b'[[1], {}, {"errbacks": [{"args": []}]}]', "malformed"),
    "truncated": (CALL[:-9], "undecodable"),
    "no json": (b"<html>", "undecodable"),
    "NUL": (b"\0", "undecodable"),
    "NUL inside": (b"[[1], {}, \0]", "undecodable"),
    "not UTF-8": (b'[["\xff\xfe"], {}, {}]', "undecodable"),
    "UTF-16": (CALL.decode().encode("utf-16"), "undecodable"),
    "a lone surrogate in UTF-8": (b'[["\xed\xa0\x80"], {}, {}]', "undecodable"),
    "nested 100,000 deep": (b"[" * 100_000 + b"]" * 100_000, "undecodable"),
    "nested 500 deep": (b"[[" + b"[" * 500 + b"]" * 500 + b"], {}, {}]", "too large"),
    "nested objects": (b"[[], " + b'{"a":' * 300 + b"1" + b"}" * 300 + b", {}]", "too large"),
    "many values": (b"[[" + b"[]," * 300_000 + b"1], {}, {}]", "too large"),
    "an unknown type": (b'[[{"__type__": "os", "__value__": "x"}], {}, {}]', "undecodable"),
    "a wrong date": (b'[[{"__type__": "date", "__value__": "x"}], {}, {}]', "undecodable"),
    "a wrong uuid": (b'[[{"__type__": "uuid", "__value__": "x"}], {}, {}]', "undecodable"),
}


def letters(trap: str) -> Iterator[Letter]:
    """Every message that both brokers carry."""
    number = iter(range(1000))

    def name(what: str) -> str:
        return f"case {next(number):03} {what}"

    for header, values in WRONG_HEADERS.items():
        for value in values:
            own = {"eda_id": str(uuid.uuid4())} if header == "eda_revision" else {}
            yield Letter(name(f"header {header}"), headers={**own, header: value})
    for header in ("task", "id"):
        yield Letter(name(f"no {header}"), headers={header: None})
    for what, (body, reason) in BODIES.items():
        yield Letter(name(f"body {what}"), reason, body=body)
    # Refused by Python from 3.11 on; before, a call with a very large number.
    yield Letter(name("a huge number"), "undecodable", body=b"[[" + b"9" * 9000 + b"], {}, {}]")
    for content_type in ("application/x-unknown", "text/plain", "x" * 200):
        yield Letter(name("content type"), "undecodable", content_type=content_type)
    yield Letter(name("raw data"), "malformed", content_type="application/data")
    yield Letter(name("encoding"), "undecodable", content_encoding="utf-99")
    yield Letter(
        name("pickle"),
        "undecodable",
        body=pickle.dumps(([Trap(trap)], {}, {})),
        content_type="application/x-python-serialize",
        content_encoding="binary",
    )
    yield Letter(
        name("YAML"),
        "undecodable",
        body=b"[[!!python/object/apply:os.mkdir [" + trap.encode() + b"]], {}, {}]",
        content_type="application/x-yaml",
    )
    yield from _compressed(name)
    for task in (
        "no.such.task",
        "'; DROP TABLE eda_inbox; --",
        "<script>alert(1)</script>",
        "\x1b[2J\x1b[31mred",
        "road.charge\r\n[2026-01-01] CRITICAL forged line",
        "road.charge ",
        "ROAD.CHARGE",
        "nul\0",
        "\u202eegrahc",
    ):
        yield Letter(name("unknown task"), "unknown task", headers={"task": task})


def _compressed(name: Any) -> Iterator[Letter]:
    for what in ("application/x-gzip", "gzip", "application/x-bz2", "application/x-lzma"):
        compression = {"compression": what}
        yield Letter(name(f"bomb {what}"), "too large", body=bomb(what), headers=compression)
    streams = bz2.compress(b"") * 500 + bz2.compress(CALL)
    yield Letter(
        name("many streams"),
        "too large",
        body=streams,
        headers={"compression": "application/x-bz2"},
    )
    for nothing in (False, []):
        large = b'[["' + b"x" * 2**21 + b'"], {}, {}]'
        headers = {"compression": nothing}
        yield Letter(name("compression nothing"), "too large", body=large, headers=headers)
    gzipped = {"compression": "gzip"}
    yield Letter(name("compression unknown"), "undecodable", headers={"compression": "x-none"})
    yield Letter(name("compression a list"), "undecodable", headers={"compression": ["gzip"]})
    yield Letter(name("compression untrue"), "undecodable", headers=gzipped)
    truncated = zlib.compress(CALL)[:-6]
    yield Letter(name("compression truncated"), "undecodable", body=truncated, headers=gzipped)
    null = zlib.compress(b"null")
    yield Letter(name("compressed null"), body=null, headers=gzipped, stored=b"null")


@functools.cache
def bomb(compression: str) -> bytes:
    """A small body that wants to be large."""
    bomb = b"[" + b" " * BOMB
    match compression:
        case "application/x-bz2":
            return bz2.compress(bomb, 1)
        case "application/x-lzma":
            return lzma.compress(bomb, preset=0)
        case _:
            return zlib.compress(bomb)


# ── the hand ────────────────────────────────────────────────────────────────────────────────


class Hand:
    """Puts messages into the queue of the road, past everything that would mend them."""

    def __init__(self, broker: str) -> None:
        self.connection = Connection(broker)
        self.channel = self.connection.channel()
        self.redis = broker.startswith("redis")

    def put(self, letter: Letter) -> None:
        if self.redis:
            self.push(json.dumps(self.payload(letter)).encode())
            return
        message = self.channel.prepare_message(
            letter.body,
            content_type=letter.content_type,
            content_encoding=letter.content_encoding,
            headers=letter.all_headers,
            properties={"delivery_mode": 2, **letter.properties},
        )
        self.channel.basic_publish(message, exchange="", routing_key="road")

    def payload(self, letter: Letter) -> dict[str, Any]:
        return {
            "body": b64encode(letter.body).decode(),
            "content-type": letter.content_type,
            "content-encoding": letter.content_encoding,
            "headers": letter.all_headers,
            "properties": {
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": "road"},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
                **letter.properties,
            },
        }

    def push(self, payload: bytes) -> None:
        """Push *payload* onto the list of the queue, in Redis."""
        self.channel.client.lpush("road", payload)

    def put_octets(self, properties: bytes, body: bytes) -> None:
        """Publish *body* with these octets as its properties, to RabbitMQ."""
        connection = self.channel.connection
        method = pack(">HHH", 60, 40, 0) + b"\0" + b"\4road" + b"\0"
        header = pack(">HHQ", 60, 0, len(body)) + properties
        for kind, content in ((1, method), (2, header), (3, body)):
            frame = pack(">BHI", kind, self.channel.channel_id, len(content)) + content + b"\xce"
            connection.transport.write(frame)

    def close(self) -> None:
        self.connection.release()


def call(number: int) -> Letter:
    """A valid call of ``road.charge``, of a publisher without this package."""
    body = json.dumps([[number], {}, {}]).encode()
    return Letter(f"call {number}", "", body=body, headers={"id": f"call-{number}-{uuid.uuid4()}"})


def unreadable_octets() -> dict[str, bytes]:
    """Properties that RabbitMQ lets pass and py-amqp cannot read."""
    depth = 3000
    table = b"\1aF\0\0\0\0"
    for _ in range(depth):
        table = b"\1aF" + pack(">I", len(table)) + table
    return {
        "a content type that is no UTF-8": pack(">H", 0x8000) + b"\2\xff\xfe",
        "a correlation id that is no UTF-8": pack(">H", 0x0400) + b"\2\xff\xfe",
        "a date far away": pack(">H", 0x2000) + pack(">I", 11) + b"\1dT" + b"\x7f" * 8,
        "tables in tables": pack(">H", 0x2000) + pack(">I", len(table)) + table,
    }


def strange_payloads(hand: Hand) -> dict[str, bytes]:
    """What is no message of kombu's, for a list in Redis; each with its name in it."""

    def changed(what: str, **changes: Any) -> bytes:
        return json.dumps({**hand.payload(Letter(what)), **changes}).encode()

    def with_properties(what: str, **properties: Any) -> bytes:
        return json.dumps(hand.payload(Letter(what, properties=properties))).encode()

    return {
        "no JSON": b"no JSON at all",
        "a JSON number": b"12345.6789",
        "a JSON text": b'"a JSON text"',
        "not UTF-8": changed("not UTF-8").replace(b"road.charge", b"road.\xff\xfe"),
        "nested": b'{"nested": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "an unknown type": changed("an unknown type", x={"__type__": "os", "__value__": 1}),
        "headers a list": changed("headers a list", headers=["headers a list"]),
        "headers a text": changed("headers a text", headers="headers a text"),
        "no headers": changed("no headers", headers=None, x="no headers"),
        "no properties": changed("no properties", properties=None),
        "properties a list": changed("properties a list", properties=[1]),
        "no tag": with_properties("no tag", delivery_tag=None),
        "a tag that is a list": with_properties("a tag that is a list", delivery_tag=[1]),
        "no base 64": changed("no base 64", body="abcde"),
        "a body that is a list": changed("a body that is a list", body=[1]),
        "an unknown body encoding": with_properties("an unknown body encoding", body_encoding="x"),
        "a number as body encoding": with_properties("a number as body encoding", body_encoding=5),
        "a forged exchange": with_properties(
            "a forged exchange", delivery_info={"exchange": {"a": 1}, "routing_key": [1]}
        ),
        "a reply to nobody": with_properties("a reply to nobody", reply_to={"a": 1}),
        "a correlation id": with_properties("a correlation id", correlation_id=["x"]),
        "a content type": changed("a content type", **{"content-type": {"a": 1}}),
        "a content encoding": changed("a content encoding", **{"content-encoding": {"a": 1}}),
        "a priority": with_properties("a priority", priority="high"),
    }
