"""Ordering keys: messages with the same key take effect in the order of their commits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from celery_eda.core.identity import Lane
from celery_eda.core.limits import KEY_BYTES
from celery_eda.errors import InvalidKey

#: Argument of ``@eda.task(key=…)``: a parameter's name, or a function of the task's arguments.
Key = str | Callable[..., Any]


def key_function(function: Callable[..., Any], key: Key) -> Callable[..., Any]:
    """A function that returns the key of a call of *function*; it takes the same arguments.

    Raises:
        InvalidKey: *function* has no parameter of that name.
    """
    if callable(key):
        return key
    signature = inspect.signature(function)
    if key not in signature.parameters:
        raise InvalidKey(
            f"key={key!r} names no parameter of {function.__qualname__}{signature}. "
            "Name one, or give a function of the task's arguments."
        )

    def key_of(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments[key]

    return key_of


def ordering_key(source: str, scope: str, key: Any) -> Lane:
    """The lane of messages of *scope* that the service *source* publishes with *key*.

    Raises:
        InvalidKey: *key* has no unambiguous text (None, a float, a collection), or is too long.
    """
    # A str stays as it is: str() of a member of a `str, Enum` would be the name of the member.
    text = key if isinstance(key, str) else str(key)
    if not text or key is None or isinstance(key, float | list | dict | set):
        raise InvalidKey(
            f"{key!r} is no ordering key of {scope}: give a text, an integer or a UUID."
        )
    if len(text.encode(errors="replace")) > KEY_BYTES or not text.isprintable():
        raise InvalidKey(
            f"The ordering key {text[:40]!r}… of {scope} has {len(text)} characters; "
            f"a key is at most {KEY_BYTES} bytes of printable text. Use a digest of it."
        )
    return Lane(source, scope, text)
