"""What is secret, kept out of error texts, tracebacks and log lines.

A secret is known by what stands before it (``password=``, ``Authorization:``, the user in a URL),
or because the message in hand carries it under such a name. A secret that goes by another name is
not found: an error that quotes it keeps it.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from celery._state import get_current_worker_task

#: Stands where a secret was.
HIDDEN = "[hidden]"
#: Shorter values are not looked for: they would be found in every other word.
SHORTEST_SECRET = 4
#: Values looked at in a message's arguments, at most.
MOST_VALUES = 10_000
#: Characters of a line or an error text that are looked through; the rest is cut off.
LONGEST_TEXT = 40_000

# A word of its own, or one that begins in the middle: dbPass.
_BEGINS = r"(?-i:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))"
_NAME = (
    r"(?:password|passwd|passphrase|secret|token|api[_-]?key|access[_-]?key|private[_-]?key"
    rf"|credential|authorization|{_BEGINS}(?:pass|passcode|pwd|auth|cookie|cvv|cvc|iban|dsn"
    r"|card[_-]?number))s?"
)
_SECRET_NAME = re.compile(rf"{_NAME}(?![A-Za-z])|{_NAME}(?-i:(?=[A-Z]))", re.I)
_QUOTED = r"\"(?:[^\"\\]|\\.){0,8000}\"|'(?:[^'\\]|\\.){0,8000}'"
# Every repetition is bounded, so that no text takes longer than its length.
_PATTERNS = (
    # scheme://user:password@host; a password may itself hold an @
    (re.compile(r"(\b[a-z][a-z0-9+.\-]{0,30}://[^\s:/@'\"]{0,256}:)[^\s'\"]{1,512}@", re.I), "@"),
    (
        re.compile(
            rf"((?:proxy-)?authorization[\"']?\s{{0,3}}[=:]\s{{0,3}})(?:{_QUOTED}|[\"']?[^\r\n\"']{{1,8000}})",
            re.I,
        ),
        "",
    ),
    (re.compile(r"(\b(?:bearer|basic)\s{1,3})[\w.~+/=\-]{8,4096}", re.I), ""),
    (
        re.compile(
            rf"({_NAME}(?:[_-]\w{{1,30}})?[\"']?\s{{0,3}}(?:=>|[=:])\s{{0,3}})"
            rf"(?!\[hidden\])(?:{_QUOTED}|[\"']?[^\s,;&)\]}}\"']{{1,8000}})",
            re.I,
        ),
        "",
    ),
    # SQLAlchemy ends its errors with the values of the statement.
    (re.compile(r"(\[parameters: )[^\n]{1,20000}(?=\])"), ""),
)


def redact(text: str, secrets: Sequence[str] = ()) -> str:
    """*text* without what looks like a secret and without *secrets*; cut to what is looked at."""
    text = text[:LONGEST_TEXT]
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    for pattern, end in _PATTERNS:
        text = pattern.sub(rf"\g<1>{HIDDEN}{end}", text)
    return text


def is_secret(name: str) -> bool:
    """Whether a value of this *name* is nobody's business."""
    return _SECRET_NAME.search(name[:256]) is not None


def secrets_of(arguments: Mapping[str, Any]) -> list[str]:
    """The values in *arguments*, at any depth, whose names say that they are secret.

    The longest come first, and each also as it looks when quoted.
    """
    found: set[str] = set()
    for number, value in enumerate(_secret_values(arguments)):
        if number >= MOST_VALUES:
            break
        text = str(value)
        found.update((text, repr(text)[1:-1], json.dumps(text)[1:-1]))
    return sorted((each for each in found if len(each) >= SHORTEST_SECRET), key=len, reverse=True)


def secrets_in_hand() -> list[str]:
    """The secret arguments of the message that this worker handles right here."""
    task = get_current_worker_task()
    if task is None:
        return []
    request = task.request
    try:
        named = inspect.signature(task.run).bind_partial(*(request.args or ())).arguments
    except (TypeError, ValueError):
        named = {}
    return secrets_of({**named, **(request.kwargs or {})})


def logger(name: str) -> logging.Logger:
    """The logger of that *name*, whose lines hold no secrets."""
    log = logging.getLogger(name)
    if not any(isinstance(each, Redaction) for each in log.filters):
        log.addFilter(Redaction())
    return log


class Redaction(logging.Filter):
    """Takes the secrets out of a log line, and out of the traceback that comes with it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not _tells_of_an_error(record):
            return True
        secrets = secrets_in_hand()
        record.msg, record.args = storable(redact(_message(record), secrets)), ()
        if record.exc_info:
            traceback = _formatter.formatException(record.exc_info)
            record.exc_text = storable(redact(traceback, secrets))
        return True


_formatter = logging.Formatter()


def _tells_of_an_error(record: logging.LogRecord) -> bool:
    """Whether somebody else's words may be in it; Celery tells of a retry as of good news."""
    retried = isinstance(record.args, Mapping) and "exc" in record.args
    return record.levelno >= logging.WARNING or bool(record.exc_info) or retried


def storable(text: str) -> str:
    """*text* without what a database or a log refuses: lone surrogates, and NUL on PostgreSQL."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # the text of somebody's error may itself fail
        return str(record.msg)


def _secret_values(arguments: Mapping[str, Any]) -> Iterator[Any]:
    """Without recursion: arguments may be nested deeper than the stack."""
    pending: list[tuple[bool, Any]] = [(False, arguments)]
    for _ in range(MOST_VALUES):
        if not pending:
            return
        secret, value = pending.pop()
        if isinstance(value, Mapping):
            pending += [(secret or is_secret(str(name)), each) for name, each in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            pending += [(secret, each) for each in value]
        elif secret and value is not None and not isinstance(value, bool):
            yield value
