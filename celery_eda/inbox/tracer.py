"""The guard around Celery's tracer, which runs a task in a worker and reports its end.

The tracer does more than to call the task. It may look up an earlier result, or store that the task
has started; if that fails, or a time limit ends it, it reports a failure, and Celery acknowledges a
message whose task was never called. Here such a message goes back to the broker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionInfo
from celery import Task
from celery.app.trace import TraceInfo, report_internal_error, trace_ok_t
from celery.exceptions import Reject
from celery.states import FAILURE, REJECTED

from celery_eda.core import context
from celery_eda.core.context import Tracing
from celery_eda.errors import NotDelivered
from celery_eda.inbox.requeue import requeue


def guarded(task: Task, trace: Callable[..., Any]) -> Callable[..., Any]:
    """*trace*, Celery's tracer of *task*, made to return a message that it has not delivered."""

    def trace_or_requeue(
        task_id: str, args: Any, kwargs: Any, request: dict[str, Any] | None = None
    ) -> Any:
        tracing = Tracing(task_id)
        try:
            with context.traced(tracing):
                traced = trace(task_id, args, kwargs, _for_celery(task, tracing, request or {}))
            if not tracing.recorded and not _is_rejected(traced):
                raise NotDelivered(f"Celery has not called the task: {_error_of(traced)!r}")
            return traced
        except Exception as error:
            return _end_of(task, tracing, error)

    return trace_or_requeue


def _end_of(task: Task, tracing: Tracing, error: Exception) -> Any:
    """The end of a call for the pool; *error* has interrupted Celery, or its report of the end.

    A pool of processes would take an exception too, but in others the message would be stuck.
    """
    if tracing.recorded and not isinstance(error, Reject):
        return trace_ok_t(report_internal_error(task, error), TraceInfo(FAILURE, error), 0.0, None)
    try:
        requeue(task, tracing.task_id, error)
    except Reject as reject:
        return trace_ok_t(ExceptionInfo(internal=True), TraceInfo(REJECTED, reject), 0.0, None)


def _for_celery(task: Task, tracing: Tracing, request: dict[str, Any]) -> dict[str, Any]:
    """*request* as Celery gets it: without the mark of a redelivery, which *tracing* keeps.

    With ``worker_deduplicate_successful_tasks`` it would not call the task again, though the
    message's part in a chord, say, may be missing. The inbox knows what is a copy.
    """
    info = request.get("delivery_info") or {}
    tracing.redelivered = bool(info.get("redelivered"))
    if not task.app.conf.worker_deduplicate_successful_tasks:
        return request
    return {**request, "delivery_info": {**info, "redelivered": False}}


def _is_rejected(traced: Any) -> bool:
    return traced.info is not None and traced.info.state == REJECTED


def _error_of(traced: Any) -> Any:
    return traced.info and traced.info.retval
