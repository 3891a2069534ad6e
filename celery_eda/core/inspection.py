"""Validation of each message before Celery's own code handles it.

A message that passes cannot stop a worker: every header that Celery uses has the type and bounds
that Celery assumes, and the body is a call. The message is not changed.
"""

from __future__ import annotations

import math
import re
from codecs import lookup
from collections.abc import Callable, Mapping
from datetime import datetime
from json import JSONDecodeError
from typing import Any

from celery.app.task import Context
from celery.utils.time import maybe_iso8601
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.serialization import SKIP_DECODE

from celery_eda.core import addresses
from celery_eda.core.identity import Identity, Position
from celery_eda.core.limits import LARGEST, NAME_LENGTH, Limits, fits
from celery_eda.core.message import UNREADABLE
from celery_eda.errors import Malformed, TooLarge, Undecodable

#: Characters of an id, an address or another name.
LONGEST_NAME = NAME_LENGTH
#: Characters of a text for people.
LONGEST_TEXT = 65_536
#: Years in which every moment can be converted to another time zone and be waited for.
YEARS = range(1970, 9999)
JSON = "application/json"
#: Each value of a JSON text comes after one of these.
_SEPARATORS = (b",", b"[", b"{")
# Strings, and one that is not closed; it matches from each quotation mark, so it takes one pass.
_STRINGS = re.compile(rb'"[^"\\]*(?:\\.?[^"\\]*)*(?:"|\Z)', re.S)
_TEXTS = (str, bytes, memoryview)
_LISTS = (list, tuple)
#: Types of values whose size does not count.
_SMALL = frozenset((type(None), bool, int, float))
#: Keys of the third part of a body; Celery writes no others.
EMBEDDED = ("callbacks", "errbacks", "chain", "chord")
#: Names of methods of Celery's request, which a header of that name would hide.
_RESERVED = frozenset(name for name in dir(Context) if callable(getattr(Context, name)))


def inspect(message: Any, limits: Limits) -> Malformed | None:
    """The reason why kombu's *message* must not be handled; None if it may be.

    The body is decoded as Celery would decode it; kombu caches the result for Celery.
    """
    try:
        _check_size(message, limits)
        _check_headers(message.headers)
        _check_properties(message)
        payload = _decoded(message)
        _check_nesting(message, payload, limits.nesting)
        _check_call(payload)
    except Malformed as error:
        return error
    except Exception as error:
        return Malformed(f"it cannot be read: {type(error).__name__}")
    return None


def undecodable(error: Exception) -> Undecodable:
    """*error* of kombu or of a decoder, described without quoting the message."""
    cause = error.args[0] if isinstance(error, DecodeError) and error.args else error
    match cause:
        case UnicodeError():
            words = f": {cause.reason}" if hasattr(cause, "reason") else ""
        case JSONDecodeError():
            words = f": {cause.msg} at character {cause.pos}"
        case ContentDisallowed():
            words = ": accept_content does not allow its content type"
        case _:
            words = ""
    return Undecodable(f"The body cannot be decoded: {type(cause).__name__}{words}.")


# ── size ────────────────────────────────────────────────────────────────────────────────────


def _check_size(message: Any, limits: Limits) -> None:
    # A compressed body has been bounded when it was decompressed.
    is_compressed = bool(message.headers.get("compression"))
    if not is_compressed and len(message.body or b"") > limits.bytes:
        raise TooLarge(
            f"The body has {len(message.body)} bytes; eda_max_message_bytes is {limits.bytes}."
        )
    if (items := _items(message, limits.items)) > limits.items:
        raise TooLarge(f"The body has {items} values; eda_max_items is {limits.items}.")
    depth, size = measure(message.headers)
    if size > limits.bytes:
        raise TooLarge(f"The headers have {size} bytes; eda_max_message_bytes is {limits.bytes}.")
    if depth > limits.nesting:
        raise TooLarge(f"The headers are nested {depth} deep; eda_max_nesting is {limits.nesting}.")


def _items(message: Any, most: int) -> int:
    """The number of values in a body of JSON, found without decoding it; exact above *most*."""
    if message.content_type != JSON or not message.body:
        return 0
    given = message.body
    body = given.encode(errors="surrogatepass") if isinstance(given, str) else bytes(given)
    if (items := sum(map(body.count, _SEPARATORS))) <= most:
        return items
    return sum(map(_STRINGS.sub(b"", body).count, _SEPARATORS))


def _check_nesting(message: Any, payload: Any, most: int) -> None:
    body = message.body
    is_json = message.content_type == JSON and isinstance(body, bytes)
    if is_json and body.count(b"[") + body.count(b"{") <= most:
        return  # each level has a bracket of its own
    if (depth := measure(payload)[0]) > most:
        raise TooLarge(f"The body is nested {depth} deep; eda_max_nesting is {most}.")


def measure(value: Any) -> tuple[int, int]:
    """The nesting depth of *value*, and roughly the bytes of its texts."""
    depth = size = 0
    level = [value]
    while level:
        within: list[Any] = []
        nests = False
        for each in level:
            kind = type(each)
            if kind is str:
                size += len(each)
            elif kind in _SMALL:
                continue
            elif isinstance(each, _TEXTS):
                size += len(each)
            elif isinstance(each, dict):
                nests = True
                within += each
                within += each.values()
            elif isinstance(each, _LISTS):
                nests = True
                within += each
        depth += nests
        level = within
    return depth, size


# ── headers and properties ──────────────────────────────────────────────────────────────────


def _check_headers(headers: Any) -> None:
    if not isinstance(headers, Mapping):
        raise Malformed(f"headers: no mapping, but {type(headers).__name__}")
    if UNREADABLE in headers:
        raise Malformed("headers and properties: the client library cannot read them")
    for name, value in headers.items():
        if not isinstance(name, str):
            raise Malformed("headers: a name is not text")
        if name in _RESERVED:
            raise Malformed(f"header {name!r}: its name is reserved")
        if value is not None and (check := _HEADERS.get(name)) and not check(value):
            raise Malformed(f"header {name!r}: {_described(value)}")
    for name in ("task", "id"):
        if not headers.get(name):
            raise Malformed(f"header {name!r}: missing or empty")
    try:
        Identity.of_headers(headers)
        Position.of_headers(headers)
        addresses.of_headers(headers)
    except ValueError as error:
        words = "headers: an identity, position or address that this package cannot have written"
        raise Malformed(words) from error


def _check_properties(message: Any) -> None:
    for name in ("correlation_id", "reply_to"):
        value = message.properties.get(name)
        if value is not None and not _is_long_name(value):
            raise Malformed(f"property {name!r}: {_described(value)}")
    for name in ("exchange", "routing_key"):
        value = (message.delivery_info or {}).get(name) or ""
        if not _is_name(value):
            raise Malformed(f"delivery info {name!r}: {_described(value)}")
    for name in ("content_type", "content_encoding"):
        value = getattr(message, name)
        if value is not None and not _is_name(value):
            raise Malformed(f"property {name!r}: {_described(value)}")
    if not isinstance(message.properties.get("priority") or 0, int):
        raise Malformed("property 'priority': not an integer")


def _described(value: Any) -> str:
    """A description of *value* without its content, which may be secret, or a gigabyte long."""
    if isinstance(value, str):
        return f"a text of {len(value)} characters is not valid here"
    return f"a value of type {type(value).__name__} is not valid here"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and fits(value)


def _is_long_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_NAME


def _is_prose(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_duration(value: Any) -> bool:
    if value is None:
        return True
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= LARGEST


def _is_limits(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_duration, value))


def _is_moment(value: Any) -> bool:
    try:
        moment = maybe_iso8601(value) if isinstance(value, str) else value
    except (AttributeError, TypeError, ValueError):
        return False
    return isinstance(moment, datetime) and moment.year in YEARS


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_name, value))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _is_signature(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("task"), str)


def _is_signatures(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_signature, value))


_EMBEDDED: Mapping[str, Callable[[Any], bool]] = {
    "callbacks": _is_signatures,
    "errbacks": _is_signatures,
    "chain": _is_signatures,
    "chord": _is_signature,
}

#: Check of each header that is neither absent nor null.
_HEADERS: Mapping[str, Callable[[Any], bool]] = {
    # A name of no known task is refused later, however strange it is.
    "task": _is_long_name,
    **dict.fromkeys(("id", "root_id", "parent_id", "group", "lang", "origin"), _is_name),
    "shadow": _is_name,
    **dict.fromkeys(("argsrepr", "kwargsrepr", "meth"), _is_prose),
    **dict.fromkeys(("eta", "expires"), _is_moment),
    "timelimit": _is_limits,
    **dict.fromkeys(("retries", "replaced_task_nesting", "group_index"), _is_count),
    **dict.fromkeys(("ignore_result", "redelivered"), _is_flag),
    **dict.fromkeys(("stamped_headers", "groups"), _is_names),
    "stamps": _is_mapping,
    # Celery uses these if the body has none.
    **_EMBEDDED,
}


# ── body ────────────────────────────────────────────────────────────────────────────────────


def _decoded(message: Any) -> Any:
    try:
        if (encoding := message.content_encoding) and encoding.lower() not in SKIP_DECODE:
            lookup(encoding)
        return message.payload
    except Exception as error:
        raise undecodable(error) from error


def _check_call(payload: Any) -> None:
    """A call is ``[args, kwargs, embedded]``."""
    if not isinstance(payload, list | tuple) or len(payload) != 3:
        raise Malformed("body: not [arguments, keyword arguments, embedded]")
    args, kwargs, embedded = payload
    if not isinstance(args, list | tuple):
        raise Malformed(f"body: arguments: {_described(args)}")
    if not _is_mapping(kwargs):
        raise Malformed(f"body: keyword arguments: {_described(kwargs)}")
    if embedded is None:
        return
    if not isinstance(embedded, Mapping) or not embedded.keys() <= _EMBEDDED.keys():
        raise Malformed("body: embedded: more or other than " + ", ".join(EMBEDDED))
    for name, value in embedded.items():
        if value is not None and not _EMBEDDED[name](value):
            raise Malformed(f"body: {name}: {_described(value)}")
