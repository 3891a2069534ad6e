"""Errors and other foreign text, made safe to store and to print.

What is stored is bounded and without secrets; what is printed cannot control a terminal.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Sequence

from celery.utils.serialization import get_pickleable_exception

from celery_eda.core import redaction
from celery_eda.errors import Unprintable

#: Characters of an error's text and of its traceback that are stored.
LONGEST_ERROR = 10_000
#: Characters of a text in one line of the log.
LONGEST_IN_LOG = 200


def text_of(error: BaseException | str, secrets: Sequence[str] = ()) -> str:
    """The text of *error*, redacted, at most :data:`LONGEST_ERROR` characters.

    An exception whose ``__str__`` fails is described by its class.
    """
    try:
        text = "".join([str(error)])  # a plain text, even if `__str__` returns a subclass
    except BaseException:
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


def presentable(error: Exception) -> Exception:
    """*error*, or an error that describes it if Celery could not print, compare or send *error*.

    Celery calls all methods of an error that are called here, in places where it expects none to
    fail: the message would not be acknowledged, or a process would end.
    """
    try:
        _ = bool(error), error == error, hash(error), error.args
        _ = str(error), repr(error), error.__reduce__()
        traceback.format_exception(type(error), error, error.__traceback__)
        sent = get_pickleable_exception(error)
        _ = bool(sent), str(sent), repr(sent), pickle.loads(pickle.dumps(sent))
    except BaseException:
        name = redaction.storable(type(error).__qualname__)
        described = Unprintable(f"{name}, which cannot be printed: {text_of(error)}")
        return described.with_traceback(error.__traceback__)
    return error


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
