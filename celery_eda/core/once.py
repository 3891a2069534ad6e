"""A part of an object that is made when it is first read, once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, overload

from celery_eda.core.forks import on_fork

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


class cached_once(Generic[T]):  # noqa: N801  # it is used as a decorator
    """A ``cached_property`` that calls its function once, also if several threads read it at once.

    ``functools.cached_property`` has had no lock since Python 3.12, and two engines or two sender
    threads must not exist side by side. After the first read the value is a plain attribute.
    """

    _all: ClassVar[list[cached_once[Any]]] = []

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._name = make.__name__
        self._lock = threading.RLock()
        self.__doc__ = make.__doc__
        cached_once._all.append(self)

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...
    def __get__(self, instance: object | None, owner: type | None = None) -> Self | T:
        if instance is None:
            return self
        made = vars(instance)
        with self._lock:
            if self._name not in made:
                made[self._name] = self._make(instance)
            value: T = made[self._name]
            return value


def _renew_locks() -> None:
    """Replace the locks in a forked child: a thread that only the parent has may hold one."""
    for each in cached_once._all:
        each._lock = threading.RLock()


on_fork(_renew_locks)
