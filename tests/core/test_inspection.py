"""What the look at a message lets pass, and what it refuses, without a broker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from celery import Celery
from kombu import compression
from kombu.message import Message
from kombu.serialization import dumps, prepare_accept_content
from kombu.utils import json as kombu_json

from celery_eda.core.compression import limit_decompression
from celery_eda.core.error_text import loggable
from celery_eda.core.inspection import inspect
from celery_eda.core.limits import Limits
from celery_eda.dead_letters.letter import Reason
from celery_eda.errors import TooLarge
from celery_eda.inbox.refusals import (
    OTHERS,
    UNREADABLE_JSON,
    Refusal,
    RefusedMessage,
    refused,
    storable,
)
from tests.faults.programs.hostile_messages import Letter, letters

ANY = Refusal(Reason.malformed, ValueError())
LIMITS = Limits(bytes=2**20, nesting=200, items=250_000)
SECRET = "hunter2"
EVERYTHING = list(letters("/nowhere"))


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """With bounded decompression, as in a worker."""
    decoders = dict(compression._decoders)
    limit_decompression(2**21, 2**21)
    yield
    compression._decoders.update(decoders)


def received(letter: Letter) -> Message:
    """*letter* as kombu's consumer gets it."""
    return Message(
        body=letter.body,
        content_type=letter.content_type,
        content_encoding=letter.content_encoding,
        delivery_info={"exchange": "", "routing_key": "road", "delivery_tag": 1},
        properties={"delivery_mode": 2, **letter.properties},
        headers=letter.all_headers,
        accept=prepare_accept_content(["json"]),
    )


def test_commas_within_texts_are_no_values() -> None:
    text = b'[["' + b',\\",[' * 100_000 + b'"], {}, {}]'

    assert reason(received(Letter("commas", "", body=text))) is None


def test_the_values_of_an_unclosed_text_are_counted_in_one_pass() -> None:
    text = b'[["' + b'\\",' * 300_000

    assert reason(received(Letter("unclosed", "", body=text))) is Reason.undecodable


def kept(letter: Letter) -> RefusedMessage:
    return refused(received(letter), ANY)


def reason(message: Message) -> Reason | None:
    error = message.errors[0][1] if message.errors else inspect(message, LIMITS)
    return Refusal.of(error).reason if error else None


@pytest.mark.parametrize("letter", EVERYTHING, ids=lambda letter: ascii(letter.name))
def test_a_hostile_message_is_refused_for_what_is_wrong_with_it(letter: Letter) -> None:
    # Whether a task is known is for the worker to say.
    expected = None if letter.reason == "unknown task" else Reason(letter.reason)

    assert reason(received(letter)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"countdown": 3, "expires": 60},
        {"eta": datetime(2030, 1, 1), "expires": "2031-01-01T00:00:00Z"},
        {"time_limit": 5.5, "soft_time_limit": 0},
        {"link": "link", "link_error": "link", "shadow": "other name"},
        {"retries": 3, "group_id": "g", "group_index": 4, "root_id": "r", "parent_id": "p"},
        {"chain": "chain"},
        {"headers": {"x-user": {"deep": [1, {"er": None}]}}},
        {"stamped_headers": ["monitoring"], "monitoring": "x"},
        {"serializer": "json", "compression": "gzip"},
        {"compression": "bzip2"},
        {"compression": "lzma"},
        {"ignore_result": True, "priority": 3, "reply_to": "queue"},
    ],
    ids=str,
)
def test_whatever_celery_itself_sends_passes(options: dict[str, Any]) -> None:
    app = Celery("unit", broker="memory://", set_as_current=False)
    sent: list[Message] = []

    @app.task(name="unit.task")
    def task(*args: Any, **kwargs: Any) -> None: ...

    class Producer:
        connection = channel = None

        def publish(self, body: Any, **given: Any) -> None:
            headers = dict(given["headers"])
            content_type, encoding, body = dumps(body, given.get("serializer"))
            if given.get("compression"):
                body, headers["compression"] = compression.compress(body, given["compression"])
            properties = {name: given.get(name) for name in ("correlation_id", "reply_to")}
            over_the_wire = kombu_json.loads(kombu_json.dumps(headers))
            sent.append(Message(body, None, content_type, encoding, {}, properties, over_the_wire))

    for name in ("link", "link_error"):
        if name in options:
            options = {**options, name: task.s(1) | task.s(2)}
    if "chain" in options:
        options = {"chain": [dict(task.s(1)), dict(task.s() | task.s())]}
    app.amqp.send_task_message(
        Producer(),
        "unit.task",
        app.amqp.as_task_v2("id", "unit.task", (1, {"a": "b"}), {"c": 1}, **_as_celery(options)),
    )

    assert [reason(message) for message in sent] == [None]


def _as_celery(options: dict[str, Any]) -> dict[str, Any]:
    """*options* under the names that they have further in."""
    names = {"link": "callbacks", "link_error": "errbacks"}
    changed = {
        names.get(name, name): [value] if name in names else value
        for name, value in options.items()
    }
    for name in ("serializer", "compression", "priority"):
        changed.pop(name, None)
    return changed


# ── decompression ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["zlib", "bzip2", "xz"])
def test_decompression_is_exact_up_to_its_bound_and_refuses_the_next_byte(name: str) -> None:
    full, over = (compression.compress(b"x" * size, name)[0] for size in (2**21, 2**21 + 1))

    assert compression.decompress(full, name) == b"x" * 2**21
    with pytest.raises(TooLarge):
        compression.decompress(over, name)


@pytest.mark.parametrize("name", ["bzip2", "xz"])
def test_streams_one_after_the_other_share_the_bound(name: str) -> None:
    part = compression.compress(b"x" * 2**20, name)[0]

    assert len(compression.decompress(part * 2, name)) == 2**21
    with pytest.raises(TooLarge):
        compression.decompress(part * 3, name)


# ── what is kept ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "headers",
    [
        {"bytes": b"\xff", "date": datetime(2030, 1, 1), "none": None, "nan": [float("inf")]},
        {"text": "\ud800 \0 \x1b[31m", "deep": {"er": [{"x": "y"}]}},
    ],
)
def test_headers_that_json_can_hold_are_read_back_as_they_were(headers: Any) -> None:
    assert kombu_json.loads(kombu_json.dumps(storable(headers))) == headers


def test_buffers_and_names_that_are_bytes_become_storable() -> None:
    kept = storable({b"\xff": memoryview(b"abc"), "x": [bytearray(b"\xfe")]})

    assert kept == {"\\xff": b"abc", "x": [b"\xfe"]}


@pytest.mark.parametrize(
    "headers", [{"x": {"__type__": "os", "__value__": 1}}, ["no", "mapping"], "text"], ids=str
)
def test_what_could_not_be_read_back_is_kept_as_text(headers: Any) -> None:
    assert storable(headers) == {UNREADABLE_JSON: json.dumps(headers)}


def test_headers_of_any_depth_are_kept() -> None:
    deep: Any = "bottom"
    for _ in range(100_000):
        deep = [deep]

    text = '{"x": ' + "[" * 100_000 + '"bottom"' + "]" * 100_000 + "}"
    assert storable({"x": deep}) == {UNREADABLE_JSON: text}


def test_names_too_long_for_a_column_are_cut_there_and_whole_in_the_headers() -> None:
    letter = kept(Letter("x", headers={"task": "x" * 5000})).letter

    assert letter.task == "x" * 255
    assert letter.headers["task"] == "x" * 5000


def test_properties_that_nothing_can_be_sent_with_are_kept_apart() -> None:
    properties = {"expiration": "60000", "priority": 3}
    letter = kept(Letter("x", properties=properties)).letter

    assert letter.properties == {
        "priority": 3,
        "delivery_mode": 2,
        OTHERS: {"expiration": "60000"},
    }


def test_a_message_of_this_package_keeps_its_identity() -> None:
    own = {"eda_id": "018f3a5e-7f6b-7cc2-8a39-1f5a7f2f7f10", "eda_revision": 4}
    refused = kept(Letter("x", headers=own))

    assert refused.letter.identity.headers == own
    assert refused.identity != refused.letter.identity


def test_a_redelivered_message_is_known_by_its_contents() -> None:
    first, again, other = (
        kept(Letter("x", headers=headers, body=body)).identity
        for headers, body in (
            ({}, b"null"),
            ({"redelivered": True, "x-delivery-count": 2}, b"null"),
            ({}, b"true"),
        )
    )

    assert first == again
    assert first != other


# ── words ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "letter",
    [
        Letter("body", body=b'[["' + SECRET.encode() + b'"'),
        Letter("no JSON", body=SECRET.encode()),
        Letter("args", body=b'["' + SECRET.encode() + b'", {}, {}]'),
        Letter("embedded", body=b'[[], {}, {"' + SECRET.encode() + b'": 1}]'),
        Letter("eta", headers={"eta": SECRET}),
        Letter("id", headers={"id": [SECRET]}),
        Letter("eda", headers={"eda_id": SECRET}),
        Letter("date", body=b'[[{"__type__": "date", "__value__": "hunter2"}], {}, {}]'),
    ],
    ids=lambda letter: letter.name,
)
def test_the_words_of_a_refusal_quote_nothing_of_the_message(letter: Letter) -> None:
    error = inspect(received(letter), LIMITS)

    assert error is not None
    assert SECRET not in str(error)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\r\nb", "a\\r\\nb"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\u202etxt", "\\u202etxt"),
        ("\ud800", "\\ud800"),
        ("x" * 201, "x" * 200 + "…"),
    ],
)
def test_a_line_of_the_log_stays_one_bounded_line(text: str, line: str) -> None:
    assert loggable(text) == line
