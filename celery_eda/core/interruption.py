"""Exceptions that are no ``Exception``: which of them end a worker, and what the others become.

Libraries raise them in ordinary code: ``asyncio.CancelledError``, ``gevent.Timeout``. Celery would
acknowledge their messages, or never free their slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from billiard.process import current_process
from celery import current_task

from celery_eda.core.error_text import text_of
from celery_eda.errors import Interrupted

_EXITS = (SystemExit, KeyboardInterrupt)


@contextmanager
def exceptions_only() -> Iterator[None]:
    """Turn every error of the user's code that does not end a worker into an ``Exception``.

    Raises:
        Interrupted: the block raised what is no ``Exception``.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if isinstance(error, _EXITS) or _is_killed(error) or _is_hard_limit(error):
            raise
        kind, text = type(error).__qualname__, text_of(error)
        raise Interrupted(f"interrupted by {kind}" + (f": {text}" if text else "")) from error


def ends_worker(error: BaseException) -> bool:
    """True if Celery has to get *error* itself, and then has the message redelivered.

    A process of the pool may end; where the pool has no processes, it may not.
    """
    if type(error) in _EXITS:
        return bool(current_process().name != "MainProcess")
    return isinstance(error, _EXITS) or _is_hard_limit(error)


def _is_killed(error: BaseException) -> bool:
    """True if the handler's greenlet was killed: the worker stops, or a person ends the task."""
    return any(each.__name__ == "GreenletExit" for each in type(error).__mro__)


def _is_hard_limit(error: BaseException) -> bool:
    """True for the time-out by which Celery's pools of greenlets enforce a hard time limit."""
    is_timeout = any(each.__name__ == "Timeout" for each in type(error).__mro__)
    if not current_task or not is_timeout:
        return False
    given = (current_task.request.timelimit or (None,))[0]
    limits = given, current_task.time_limit, current_task.app.conf.task_time_limit
    return getattr(error, "seconds", None) in [each for each in limits if each]
