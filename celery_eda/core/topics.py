"""Names of events, and patterns that match them: words separated by dots.

In a pattern ``*`` stands for exactly one word and ``#`` for any number of them, none included, as
in AMQP. Patterns mean the same on every broker.
"""

from __future__ import annotations

import re
from functools import lru_cache

from celery_eda.errors import InvalidEvent

#: Bytes of an event's name: a routing key of AMQP holds no more.
NAME_BYTES = 255
_WORD = "[A-Za-z0-9_-]+"
_NAME = re.compile(rf"{_WORD}(\.{_WORD})*")
_PATTERN = re.compile(rf"({_WORD}|\*|#)(\.({_WORD}|\*|#))*")


def category_of(name: str) -> str:
    """The part of an event's *name*, or of a stream's, before the first dot."""
    return name.partition(".")[0]


def checked_name(name: str) -> str:
    """*name*, if it is valid for an event.

    Raises:
        InvalidEvent: *name* is not valid.
    """
    if not isinstance(name, str) or len(name) > NAME_BYTES or not _NAME.fullmatch(name):
        raise InvalidEvent(
            f"{name!r} is no name of an event: words of letters, digits, - and _ with dots "
            f"between them, {NAME_BYTES} characters at the most, as in 'order.placed'."
        )
    return name


def checked_pattern(pattern: str) -> str:
    """*pattern*, if it is a valid pattern of event names.

    Raises:
        InvalidEvent: *pattern* is not valid.
    """
    if not isinstance(pattern, str) or len(pattern) > NAME_BYTES or not _PATTERN.fullmatch(pattern):
        raise InvalidEvent(
            f"{pattern!r} is no pattern of events: words with dots between them, of which * is any "
            "one word and # any number of words, as in 'order.*'."
        )
    return pattern


def matches(pattern: str, name: str) -> bool:
    """True if *pattern* matches the event *name*."""
    return _matches(tuple(pattern.split(".")), tuple(name.split(".")))


@lru_cache(maxsize=4096)
def _matches(pattern: tuple[str, ...], words: tuple[str, ...]) -> bool:
    if not pattern:
        return not words
    first, rest = pattern[0], pattern[1:]
    if first == "#":
        return _matches(rest, words) or (bool(words) and _matches(pattern, words[1:]))
    return bool(words) and first in ("*", words[0]) and _matches(rest, words[1:])
