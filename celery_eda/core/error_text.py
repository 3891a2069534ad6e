"""Errors and other foreign text, made safe to store and to print.

What is stored is bounded and without secrets; what is printed cannot control a terminal.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from celery_eda.core import redaction

#: Characters of an error's text and of its traceback that are stored.
LONGEST_ERROR = 10_000
#: Characters of a text in one line of the log.
LONGEST_IN_LOG = 200


def text_of(error: BaseException | str, secrets: Sequence[str] = ()) -> str:
    """The text of *error*, redacted, at most :data:`LONGEST_ERROR` characters.

    An exception whose ``__str__`` fails is described by its class.
    """
    try:
        text = str(error)
    except Exception:
        text = f"<{type(error).__qualname__} without a readable text>"
    # Redacted before it is cut: half a secret would not be recognised.
    return redaction.storable(redaction.redact(text, secrets)[:LONGEST_ERROR])


def traceback_of(error: BaseException | str, secrets: Sequence[str] = ()) -> str | None:
    """The traceback of *error*: lines of code, without values; None for a text.

    Redacted, and at most the last :data:`LONGEST_ERROR` characters.
    """
    if isinstance(error, str):
        return None
    frames = "".join(traceback.format_tb(error.__traceback__))
    kept = frames[-redaction.LONGEST_TEXT :]
    return redaction.storable(redaction.redact(kept, secrets)[-LONGEST_ERROR:])


def printable(text: object, *, lines: bool = False) -> str:
    """*text* with every unprintable character escaped; with *lines*, line ends remain."""
    try:
        text = str(text)
    except RecursionError:
        text = "(nested too deeply to be shown)"
    return "".join(
        each if each.isprintable() or (lines and each == "\n") else _escaped(each) for each in text
    )


def loggable(text: str) -> str:
    """*text* on one line of at most :data:`LONGEST_IN_LOG` characters, before escapes."""
    return printable(text[:LONGEST_IN_LOG] + ("…" if len(text) > LONGEST_IN_LOG else ""))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode()
