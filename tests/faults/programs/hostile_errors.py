"""Handlers, policies, repairers and conditions that end in every way that Python allows."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from sqlalchemy.orm import Session

from celery_eda.sagas import Steps
from tests.faults.programs.order_system import app, eda, record  # noqa: F401  # app: for Celery


class TextRaises(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class TextExits(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class ReprInterrupts(Exception):
    def __repr__(self) -> str:
        raise KeyboardInterrupt


class TextRecurses(Exception):
    def __str__(self) -> str:
        return str(self)

    __repr__ = __str__


class ArgsRaise(Exception):
    args = property(lambda self: 1 / 0)  # type: ignore[assignment]


class PicklingExits(Exception):
    def __reduce__(self) -> NoReturn:
        raise asyncio.CancelledError


class Truthless(Exception):
    def __bool__(self) -> bool:
        raise ValueError("neither true nor false")

    def __eq__(self, other: object) -> bool:
        raise ValueError("cannot be compared")

    __hash__ = Exception.__hash__


class Timeout(BaseException):
    """Similar to gevent's, which need not be installed."""

    seconds = 0.2


def _raise(error: BaseException) -> NoReturn:
    raise error


def _circle() -> NoReturn:
    try:
        raise KeyError("first")
    except KeyError as first:
        try:
            raise ValueError("second") from first
        except ValueError as second:
            raise first from second


def _group() -> NoReturn:
    if sys.version_info < (3, 11):
        raise GeneratorExit
    raise BaseExceptionGroup("several", [KeyboardInterrupt(), ValueError("one")])  # noqa: F821


def _syntax() -> NoReturn:
    raise SyntaxError("m", ["f", 1, "x", "text"])  # type: ignore[list-item]


def _deep(levels: int) -> NoReturn:
    if levels == 0:
        raise ValueError("deep")
    _deep(levels - 1)


#: Ends after which the message has failed for good.
DEADLY: dict[str, Callable[[], NoReturn]] = {
    "circle": _circle,
    "text raises": lambda: _raise(TextRaises()),
    "text exits": lambda: _raise(TextExits()),
    "repr interrupts": lambda: _raise(ReprInterrupts("x")),
    "text recurses": lambda: _raise(TextRecurses()),
    "args raise": lambda: _raise(ArgsRaise("x")),
    "pickling is cancelled": lambda: _raise(PicklingExits()),
    "truthless": lambda: _raise(Truthless("x")),
    "syntax": _syntax,
    "deep": lambda: _deep(700),
    "too deep": lambda: _deep(10**6),
    "stop": lambda: _raise(StopIteration(1)),
    "generator exit": lambda: _raise(GeneratorExit()),
    "cancelled": lambda: _raise(asyncio.CancelledError("no more")),
    "a time-out": lambda: _raise(Timeout()),
    "group": _group,
}
#: Ends of a worker's process; the broker redelivers their messages, so often and no more.
COUNTED: dict[str, Callable[[], NoReturn]] = {
    "interrupted": lambda: _raise(KeyboardInterrupt()),
    "exited": lambda: _raise(SystemExit(0)),
}


@eda.task(name="hostile.end")
def end(session: Session, number: int, kind: str) -> None:
    record("end", number)
    session.flush()
    {**DEADLY, **COUNTED}[kind]()


def cancelling_policy(attempts: int, error: Exception) -> float | None:
    raise asyncio.CancelledError


@eda.task(name="hostile.policy", policy=cancelling_policy)
def under_policy() -> None:
    raise ValueError("asks its policy")


@eda.task(name="hostile.retried", policy=lambda attempts, error: 0.01 if attempts < 3 else None)
def retried() -> None:
    raise asyncio.CancelledError


@eda.task(name="hostile.mended")
def mended() -> None:
    raise ValueError("to be repaired")


@eda.repairs(mended)
def mend(failure: Any) -> NoReturn:
    raise asyncio.CancelledError


@eda.task(name="hostile.errback", bind=True)
def errback(self: Any, request: Any, error: Any, traceback: Any) -> NoReturn:
    raise asyncio.CancelledError


@eda.task(name="hostile.published", key=lambda number: _raise(asyncio.CancelledError()))
def published(number: int) -> None:
    """Cannot be published."""


@eda.task(name="hostile.publishes")
def publishes() -> None:
    published.delay(1)


@eda.saga("hostile")
def saga(steps: Steps) -> None:
    with steps.when(lambda data: _raise(asyncio.CancelledError())):
        steps.step("add", "road.add")


if os.environ.get("ROAD_ASYNC", "1") == "1":

    @eda.task(name="hostile.awaits")
    async def awaits() -> None:
        child = asyncio.create_task(asyncio.sleep(10))
        child.cancel()
        await child


if os.environ.get("ROAD_GREEN") == "1":
    import gevent

    @eda.task(name="hostile.times-out")
    def times_out() -> None:
        with gevent.Timeout(0.1):
            gevent.sleep(60)

    @eda.task(name="hostile.limited", time_limit=1)
    def limited() -> None:
        gevent.sleep(60)

    @eda.task(name="hostile.killed")
    def killed() -> None:
        raise gevent.GreenletExit
