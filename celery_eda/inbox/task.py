"""The reliable task: a Celery task whose call in a worker is the delivery of a message."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from celery import Task

from celery_eda.core import context
from celery_eda.core.retry import Policy
from celery_eda.core.service import service_of
from celery_eda.inbox.ending import Ending
from celery_eda.inbox.requeue import requeue
from celery_eda.inbox.tracer import guarded
from celery_eda.inbox.wiring import Inbox
from celery_eda.requests import Reply, Requests


class ReliableTask(Task):
    """Takes effect once for every message, together with the messages that it publishes."""

    abstract = True
    acks_late = True
    acks_on_failure = True
    acks_on_timeout = False
    reject_on_worker_lost = True
    retry_on_worker_lost = False
    #: Read by :meth:`celery_eda.core.service.Service.is_reliable`.
    reliable = True
    Request = "celery_eda.inbox.request:ReliableRequest"
    #: Gives the ordering key of a call, from its arguments; None if calls have no order.
    ordering_key: Callable[..., Any] | None = None
    #: Decides whether and when a failed attempt is followed by another one; None to leave that to
    #: the setting ``eda_retry_policy``.
    retry_policy: Policy | None = None
    #: If a message fails for good, ``block`` its key until the message is repaired or skipped, or
    #: ``skip`` it at once.
    when_dead: Literal["block", "skip"] = "block"
    _tracer: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            request, ending = self.request, None
            if not (request.called_directly or request.is_eager or _is_running(request.id)):
                ending = self._deliver(request, args, kwargs)
        except BaseException as error:
            requeue(self, self.request.id, error)
        return ending.result_or_raise() if ending else super().__call__(*args, **kwargs)

    def _deliver(self, request: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Ending:
        """Deliver the message that Celery calls this task for."""
        tracing = context.tracing_of(request.id)
        if tracing and request.delivery_info:
            request.delivery_info["redelivered"] = tracing.redelivered
        ending = service_of(self.app).wing(Inbox).consumer.deliver(self, args, kwargs)
        context.abandon()  # a time limit may have interrupted the end of a failed attempt
        if tracing:
            tracing.recorded = True
        return ending

    @property
    def __trace__(self) -> Callable[..., Any] | None:
        """The function by which a worker has Celery run this task; None before a worker sets it."""
        return self._tracer

    @__trace__.setter
    def __trace__(self, trace: Callable[..., Any] | None) -> None:
        self._tracer = trace and guarded(self, trace)

    def ask(self, *args: Any, **kwargs: Any) -> Reply[Any]:
        """Ask for a reply to a call with these arguments: ``quote.ask(sku).get(timeout=2)``.

        :meth:`celery_eda.EDA.request` takes options too.

        Raises:
            OutsideTransaction: ``eda_outside`` forbids publishing here.
        """
        reply: Reply[Any] = service_of(self.app).wing(Requests).client.ask(self, args, kwargs)
        return reply

    def before_start(self, *_: Any) -> None:
        """Do nothing yet: :meth:`handle` calls the user's, inside the transaction."""

    def handle(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's function, after the ``before_start`` of the user's class."""
        super().before_start(self.request.id, args, kwargs)
        return self.run(*args, **kwargs)


def reliable_class(base: type[Task]) -> type[Task]:
    """A reliable task class that extends *base*."""
    if issubclass(base, ReliableTask):
        return base
    if base is Task:
        return ReliableTask
    return type(base.__name__, (ReliableTask, base), {"abstract": True})


def run_async(function: Callable[..., Any]) -> Callable[..., Any]:
    """*function*, made callable for Celery: an ``async def`` is run to its end.

    Code that runs in an event loop can still await it.
    """
    if not is_asynchronous(function):
        return function

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        handler = function(*args, **kwargs)
        return handler if context.running_task() else asyncio.run(handler)

    return run


def is_asynchronous(function: Callable[..., Any]) -> bool:
    """True if *function*, or the one it wraps, is an ``async def``."""
    return inspect.iscoroutinefunction(inspect.unwrap(function))


def made_reliable(task: Task) -> None:
    """Make *task*, registered as an ordinary one, reliable in place."""
    if isinstance(task, ReliableTask):
        return
    # With autoretry_for, ``run`` calls ``_orig_run``.
    run = "_orig_run" if hasattr(task, "_orig_run") else "run"
    setattr(task, run, run_async(getattr(task, run)))
    task.__class__ = type(
        type(task).__name__,
        (ReliableTask, type(task)),
        {"__module__": type(task).__module__, "__doc__": type(task).__doc__},
    )


def take_when_due(tasks: Iterable[Task]) -> None:
    """Have a worker handle delayed messages of plain *tasks*, too, as soon as they come.

    A task with a request class of its own keeps it.
    """
    for task in tasks:
        if task.Request == Task.Request:
            task.Request = "celery_eda.inbox.request:DueRequest"


def _is_running(task_id: str) -> bool:
    """True if a handler calls its own task as a plain function."""
    progress = context.in_progress.get()
    return progress is not None and progress.delivery.task_id == task_id and not progress.finished
