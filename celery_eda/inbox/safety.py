"""Options of a task with which a worker would lose messages; reliable tasks do without them.

Celery takes options from more places than the decorator: ``task_annotations``, base classes, and
assignments to attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery import Task
from kombu.utils.imports import symbol_by_name

from celery_eda.core import redaction
from celery_eda.inbox.task import ReliableTask

log = redaction.logger(__name__)

#: The options, and the only values with which no message is lost or takes effect twice.
SAFE: dict[str, Any] = {
    name: getattr(ReliableTask, name)
    for name in (
        "acks_late",
        "acks_on_failure",
        "acks_on_timeout",
        "reject_on_worker_lost",
        "retry_on_worker_lost",
        "Request",
    )
}


def unsafe_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options among *given* with which a worker would lose messages."""
    return {
        name: given[name]
        for name, safe in SAFE.items()
        if name in given and given[name] != safe and not _is_safe_request(name, given[name])
    }


def make_safe(task: Task) -> None:
    """Undo the unsafe options that a reliable *task* has, wherever they are from, with a warning.

    A worker does so before it receives messages.
    """
    unsafe = unsafe_options({name: getattr(task, name) for name in SAFE})
    if not unsafe:
        return
    for name in unsafe:
        setattr(task, name, SAFE[name])
    log.warning(
        "%s has %s, by task_annotations, a base class or an assignment. It is ignored, because a "
        "worker that is killed would lose messages or repeat their effects. Remove it.",
        task.name,
        ", ".join(f"{name}={value!r}" for name, value in unsafe.items()),
    )


def _is_safe_request(name: str, value: Any) -> bool:
    """True if the option is a class of requests that extends ours."""
    if name != "Request":
        return False
    return issubclass(symbol_by_name(value), symbol_by_name(SAFE[name]))
