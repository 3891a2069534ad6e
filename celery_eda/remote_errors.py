"""Errors of a responder, as its requester gets them: typed where the type is known and allowed.

Only a name and plain values travel. What type a name stands for, the requester decides; nothing
is imported because a message names it.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

from celery import exceptions

from celery_eda import errors, redaction
from celery_eda.dead_letters import text_of, traceback_of
from celery_eda.errors import RemoteError

#: Characters of a name, and of all arguments together, that travel.
LONGEST_NAME = 255
LONGEST_ARGUMENTS = 10_000

_PLAIN = (str, int, float, bool, type(None))
#: These mean something to whoever runs the code that would raise them.
_NEVER = (MemoryError, StopAsyncIteration, StopIteration)
_KNOWN = (
    *(each for each in vars(builtins).values() if isinstance(each, type)),
    *(each for each in vars(errors).values() if isinstance(each, type)),
    *(exceptions.TaskRevokedError, exceptions.NotRegistered, exceptions.MaxRetriesExceededError),
)


class RemoteErrors:
    """The types of errors that one app takes from others: Python's own, and what it registers."""

    def __init__(self) -> None:
        self._types: dict[str, type[Exception]] = {}
        self._names: dict[type[Exception], str] = {}
        for kind in _KNOWN:
            if issubclass(kind, Exception) and not issubclass(kind, _NEVER):
                self.register(kind, _qualified(kind))

    def register(self, kind: type[Exception], name: str | None = None) -> None:
        """Know *kind* under *name*, by default ``module.Class``."""
        self._types[name or _qualified(kind)] = kind
        self._names[kind] = name or _qualified(kind)

    def to_wire(self, error: Exception, secrets: Sequence[str] = ()) -> dict[str, Any]:
        """*error* as plain values, bounded, without *secrets* and what looks like one."""
        return {
            "type": (self._names.get(type(error)) or _qualified(type(error)))[:LONGEST_NAME],
            "args": _plain(error.args, secrets),
            "message": text_of(error, secrets),
            "traceback": traceback_of(error, secrets),
        }

    def from_wire(self, described: Any) -> Exception:
        """The error that :meth:`to_wire` has described.

        It is a :class:`RemoteError`, or one of a registered type whose cause is that.

        Raises:
            ValueError: this system cannot have described it.
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
                raise ValueError("an error that nobody can have described like that")
        if (kind := self._types.get(name)) is None or args is None:
            return remote
        try:
            error = kind(*args)
        except Exception:
            return remote
        error.__cause__ = remote
        return error


def _qualified(kind: type[BaseException]) -> str:
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def _plain(args: tuple[Any, ...], secrets: Sequence[str]) -> list[Any] | None:
    """*args* if they are plain, and not too long; else None: the error is then no typed one."""
    if not all(isinstance(each, _PLAIN) for each in args):
        return None
    if sum(len(each) for each in args if isinstance(each, str)) > LONGEST_ARGUMENTS:
        return None
    return [redaction.redact(each, secrets) if isinstance(each, str) else each for each in args]
