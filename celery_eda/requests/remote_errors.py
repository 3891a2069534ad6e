"""Errors of responders, sent to their requesters and raised there with their type if it is known.

Only a name and plain values travel. The requester maps the name to a type that it has registered;
a message never causes an import.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

from celery import exceptions

from celery_eda import errors
from celery_eda.core import redaction
from celery_eda.core.error_text import presentable, text_of, traceback_of
from celery_eda.errors import RemoteError

#: Characters at most: of the name of a type, and of all arguments together.
LONGEST_NAME = 255
LONGEST_ARGUMENTS = 10_000

_PLAIN = (str, int, float, bool, type(None))
#: Raising these would have effects in the interpreter of the requester.
_NEVER = (MemoryError, StopAsyncIteration, StopIteration, SyntaxError)
_KNOWN = (
    *(each for each in vars(builtins).values() if isinstance(each, type)),
    *(each for each in vars(errors).values() if isinstance(each, type)),
    exceptions.TaskRevokedError,
    exceptions.NotRegistered,
    exceptions.MaxRetriesExceededError,
)


class RemoteErrors:
    """Types of errors that one app can raise for others: Python's, ours and registered ones."""

    def __init__(self) -> None:
        self._types: dict[str, type[Exception]] = {}
        self._names: dict[type[Exception], str] = {}
        for kind in _KNOWN:
            if issubclass(kind, Exception) and not issubclass(kind, _NEVER):
                self.register(kind, _qualified(kind))

    def register(self, kind: type[Exception], name: str | None = None) -> None:
        """Map *name*, by default ``module.Class``, to *kind*, in both directions."""
        self._types[name or _qualified(kind)] = kind
        self._names[kind] = name or _qualified(kind)

    def to_wire(self, error: Exception, secrets: Sequence[str] = ()) -> dict[str, Any]:
        """Plain values that describe *error*, bounded, with *secrets* and similar texts redacted.

        Returns:
            ``{"type": …, "args": […] or None, "message": …, "traceback": … or None}``.
        """
        return {
            "type": (self._names.get(type(error)) or _qualified(type(error)))[:LONGEST_NAME],
            "args": _plain(error.args, secrets),
            "message": text_of(error, secrets),
            "traceback": traceback_of(error, secrets),
        }

    def from_wire(self, described: Any) -> Exception:
        """The error that :meth:`to_wire` described.

        Returns:
            An error of a registered type, whose cause is a :class:`RemoteError`; the latter
            itself if the type is unknown, or cannot be called with the arguments, or if the
            result cannot be printed.

        Raises:
            ValueError: *described* has another shape.
        """
        match described:
            case {
                "type": str(name),
                "args": list() | None as args,
                "message": str(message),
                "traceback": str() | None as traceback,
            } if len(name) <= LONGEST_NAME:
                remote = RemoteError(name, message, traceback)
            case _:
                raise ValueError("an error that this system cannot have described")
        if (kind := self._types.get(name)) is None or args is None:
            return remote
        try:
            error = kind(*args)
            error.__cause__ = remote
        except Exception:
            return remote
        return error if presentable(error) is error else remote


def _qualified(kind: type[BaseException]) -> str:
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def _plain(args: tuple[Any, ...], secrets: Sequence[str]) -> list[Any] | None:
    """*args* if all are plain and short enough; else None, and a ``RemoteError`` is raised."""
    if not all(isinstance(each, _PLAIN) for each in args):
        return None
    if sum(len(each) for each in args if isinstance(each, str)) > LONGEST_ARGUMENTS:
        return None
    return [redaction.redact(each, secrets) if isinstance(each, str) else each for each in args]
