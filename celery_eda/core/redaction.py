"""Redaction: secrets are removed from error texts, tracebacks and log lines.

A value is a secret if a telling name stands before it (``password=``, ``Authorization:``, the user
in a URL), or if it is an argument with such a name of the message in progress. Secrets under other
names are not recognized: an error text that quotes one still shows it.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from celery._state import get_current_worker_task

#: The replacement for a secret.
HIDDEN = "[hidden]"
#: Shorter values are not replaced, since they occur in ordinary words.
SHORTEST_SECRET = 4
#: Most values of a message's arguments that are examined.
MOST_VALUES = 10_000
#: Characters of a log line or an error text that are searched; longer texts are cut off there.
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
    """*text* without *secrets* and anything that looks like one, cut to :data:`LONGEST_TEXT`."""
    text = text[:LONGEST_TEXT]
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    for pattern, end in _PATTERNS:
        text = pattern.sub(rf"\g<1>{HIDDEN}{end}", text)
    return text


def is_secret(name: str) -> bool:
    """True if a value of this *name* is a secret."""
    return _SECRET_NAME.search(name[:256]) is not None


def secrets_of(arguments: Mapping[str, Any]) -> list[str]:
    """The values in *arguments*, at any depth, whose names mark them as secret.

    The longest come first. Each is also listed as Python and JSON quote it.
    """
    found: set[str] = set()
    for number, value in enumerate(_secret_values(arguments)):
        if number >= MOST_VALUES:
            break
        try:
            text = str(value)
        except BaseException:  # nothing that could be quoted
            continue
        found.update((text, repr(text)[1:-1], json.dumps(text)[1:-1]))
    return sorted((each for each in found if len(each) >= SHORTEST_SECRET), key=len, reverse=True)


def secrets_in_progress() -> list[str]:
    """The secret arguments of the message that the current thread is handling."""
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
    """The logger *name*, which redacts its records."""
    log = logging.getLogger(name)
    if not any(isinstance(each, Redaction) for each in log.filters):
        log.addFilter(Redaction())
    return log


class Redaction(logging.Filter):
    """Removes secrets from a log record and from its traceback; lets every record pass.

    A record without secrets stays as it is: trackers of errors group records by their template.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if not _may_quote_user_code(record):
            return True
        secrets = secrets_in_progress()
        message = _message(record)
        redacted = storable(redact(_template(record) if message is None else message, secrets))
        if redacted != message:
            record.msg, record.args = redacted, ()
        if record.exc_info:
            formatted = _traceback(record.exc_info)
            redacted = storable(redact(formatted or _frames(record.exc_info), secrets))
            if redacted != formatted:
                record.exc_text = redacted
        return True


_formatter = logging.Formatter()


def _may_quote_user_code(record: logging.LogRecord) -> bool:
    """True for records that may quote an error of user code.

    These are warnings and worse, records with a traceback, and Celery's INFO record of a retry.
    """
    retried = isinstance(record.args, Mapping) and "exc" in record.args
    return record.levelno >= logging.WARNING or bool(record.exc_info) or retried


def storable(text: str) -> str:
    """*text* with lone surrogates and NUL escaped, which a database or a log would refuse."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")


def _message(record: logging.LogRecord) -> str | None:
    """The text of *record*; None if its arguments do not fit, or one of them has no text."""
    try:
        return record.getMessage()
    except BaseException:  # the `__str__` of an argument may fail, in any way
        return None


def _template(record: logging.LogRecord) -> str:
    return record.msg if isinstance(record.msg, str) else object.__repr__(record.msg)


def _traceback(exc_info: Any) -> str | None:
    """The traceback as Python formats it; None if the error cannot be formatted."""
    try:
        return _formatter.formatException(exc_info)
    except BaseException:  # a SyntaxError with odd arguments, for instance
        return None


def _frames(exc_info: Any) -> str:
    return "".join([*traceback.format_tb(exc_info[2]), exc_info[0].__qualname__])


def _secret_values(arguments: Mapping[str, Any]) -> Iterator[Any]:
    """The secret values in *arguments*; found without recursion, since they may be nested deep."""
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
