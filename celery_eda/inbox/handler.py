"""The call of the user's function, and the messages that Celery would publish after it.

Celery's worker publishes links and the next task of a chain once a task has returned, outside
any transaction. Here they are published inside it: they commit together with the handler's work,
and Celery finds nothing left to do.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from celery import Task, group, signature
from celery.backends.base import DisabledBackend
from celery.exceptions import Ignore
from celery.states import FAILURE, SUCCESS

from celery_eda.core.addresses import REPLY_HEADER
from celery_eda.outbox import chords

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HandlerResult:
    """The end of a handler that did not fail.

    Attributes:
        result: returned by the handler.
        recorded: the result as the result backend encodes it, None if it will not be needed.
        ignored: raised by the handler instead of a result, e.g. because another task replaces it.
    """

    result: Any = None
    recorded: bytes | None = None
    ignored: Ignore | None = None

    def result_or_raise(self) -> Any:
        """The result.

        Raises:
            Ignore: the handler's own.
        """
        if self.ignored:
            raise self.ignored
        return self.result


def run(task: Task, args: Sequence[Any], kwargs: dict[str, Any]) -> HandlerResult:
    """Call the handler; publish its links and the next task of its chain."""
    try:
        result = task.handle(*args, **kwargs)
    except Ignore as ignored:
        return HandlerResult(ignored=ignored)
    publish_next(task, result)
    return HandlerResult(result, recorded(task, result))


def recorded(task: Task, result: Any) -> bytes | None:
    """A result or an error, encoded for a later copy of the message.

    None if the copy will not need it: for the result backend, a chord, or a reply.
    """
    backend, request = task.backend, task.request
    ignored = request.ignore_result or isinstance(backend, DisabledBackend)
    wanted = not ignored or request.chord or request.get(REPLY_HEADER)
    if result is None or not wanted:
        return None
    state = FAILURE if isinstance(result, Exception) else SUCCESS
    payload = backend.encode({"state": state, "result": backend.encode_result(result, state)})
    return payload.encode() if isinstance(payload, str) else payload


def replay_recorded(task: Task, recorded: bytes | None) -> Any:
    """The result or error of an earlier copy, whose links must not be published again."""
    request = task.request
    request.callbacks = request.errbacks = None
    chords.repeat_part(task)
    outcome = decoded(task, recorded)
    if not isinstance(outcome, Exception):
        request.chain = None
    return outcome


def decoded(task: Task, recorded: bytes | None) -> Any:
    """The inverse of :func:`recorded`: a result, or the exception that the task failed with."""
    backend = task.backend
    if recorded is None:
        return None
    is_text = backend.content_encoding != "binary"
    outcome = backend.decode(recorded.decode() if is_text else recorded)
    if outcome["state"] == FAILURE:
        return backend.exception_to_python(outcome["result"])
    return outcome["result"]


def publish_next(task: Task, result: Any) -> None:
    """Publish the links and the next task of the chain, exactly as Celery's tracer would."""
    request = task.request
    options = {"parent_id": request.id, "root_id": request.root_id or request.id}
    options["priority"] = (
        (request.delivery_info or {}).get("priority")
        if task.app.conf.task_inherit_parent_priority
        else None
    )
    links = [signature(each, app=task.app) for each in request.callbacks or ()]
    if len(links) > 1:
        for each in links:
            if isinstance(each, group):
                each.apply_async((result,), **options)
        if single := [each for each in links if not isinstance(each, group)]:
            group(single, app=task.app).apply_async((result,), **options)
    elif links:
        links[0].apply_async((result,), **options)
    if chain := request.chain:
        following = signature(chain[-1], app=task.app)
        following.apply_async((result,), chain=chain[:-1], **options)
    request.callbacks = request.chain = None


def report_revocation(task: Task, reason: str) -> None:
    """Report to the result backend, as Celery would, that the call is expired or revoked."""
    request = task.request
    store = not request.ignore_result or task.store_errors_even_if_ignored
    try:
        task.backend.mark_as_revoked(request.id, reason, request=request, store_result=store)
    except Exception:
        log.exception(
            "the result backend does not know that %s[%s] is %s", task.name, request.id, reason
        )


def report_failure(task: Task, error: Exception) -> None:
    """Report a failure to the result backend, where errbacks look for it.

    Celery reports it too, but after the commit: the errbacks may have left by then.
    """
    request = task.request
    if request.ignore_result and not task.store_errors_even_if_ignored:
        return
    try:
        task.backend.store_result(
            request.id, error, FAILURE, traceback=_traceback_of(error), request=request
        )
    except Exception:
        log.exception(
            "the result backend does not know yet that %s[%s] has failed, and its errbacks are "
            "called; Celery reports the failure again",
            task.name,
            request.id,
        )


def publish_errbacks(task: Task, error: Exception) -> None:
    """Call or publish the errbacks, exactly as Celery's result backends do after a failure."""
    request = task.request
    if request.errbacks:
        task.backend._call_task_errbacks(request, error, _traceback_of(error))
        request.errbacks = None


def _traceback_of(error: Exception) -> str:
    return "".join(traceback.format_exception(error))
