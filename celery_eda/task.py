"""The reliable task: a Celery task whose call in a worker is a delivery."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

from billiard.process import current_process
from celery import Celery, Task, signals
from celery.exceptions import Reject
from celery.utils.log import get_logger
from celery.worker import state
from celery.worker.request import Request
from kombu.asynchronous import get_event_loop
from sqlalchemy.orm import Session

from celery_eda import checkpoints, context
from celery_eda.errors import ConfigurationError, UnsafeSetting
from celery_eda.identity import VERDICT, WIRE
from celery_eda.message import Wire
from celery_eda.ordering import Key, key_function
from celery_eda.reply import Reply
from celery_eda.retry import Policy, checked

log = get_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class ReliableRequest(Request):
    """What Celery's main process knows of a message in its pool."""

    def __init__(self, message: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(message, *arguments, **options)
        # Whoever parks or buries the message writes down what came, not what became of it.
        self._request_dict[WIRE] = Wire.of(message)
        # What a message says of itself is no verdict.
        self._request_dict[VERDICT] = None

    def maybe_expire(self) -> bool:
        """Whether it has expired.

        Celery would also note its id as revoked, and a redrive with more time would be in vain.
        """
        return bool(self.expires) and self.expires < datetime.now(
            timezone.utc if self.expires.tzinfo else None
        )

    def revoked(self) -> bool:
        """Never: Celery would acknowledge what nobody has seen.

        An expired or revoked message goes on to the pool, marked as such, and is buried there.
        """
        if self._request_dict[VERDICT] is None:
            super().revoked()
        return False

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """Say that it is *reason*; one whose process was ended for that comes back to be buried."""
        self.send_event("task-revoked", terminated=terminated, signum=signum, expired=expired)
        fate = {"terminated": terminated, "signum": signum, "expired": expired}
        signals.task_revoked.send(sender=self.task, request=self._context, **fate)
        if not terminated:
            self._request_dict[VERDICT] = reason
            return
        state.task_ready(self)
        self._already_revoked = True
        self.reject(requeue=True)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Give a message whose handler overran its hard limit back to the broker.

        Celery would report a failure and acknowledge it, although nothing was committed. Coming
        back it is counted, and ends as a dead letter if it overruns every time.
        """
        if soft:
            super().on_timeout(soft, timeout)
            return
        state.task_ready(self)
        log.error("Hard time limit (%ss) exceeded for %s[%s]", timeout, self.name, self.id)
        self.reject(requeue=True)
        record = partial(
            self._app.eda.consumer.record_time_limit, self.task.name, self._request_dict
        )
        # The process is still there, and may hold the only write lock of its database.
        call_soon = getattr(get_event_loop(), "call_soon", None)
        call_soon(record) if call_soon else record()

    def _success_was_stored(self) -> bool:
        """Never: Celery would acknowledge the message of a lost worker that told its result.

        What comes after the result, its part in a chord, would never be done; a copy does it.
        """
        return False

    def acknowledge(self) -> None:
        super().acknowledge()
        checkpoints.reach("delivery.acknowledged")


class ReliableTask(Task):
    """Takes effect once for every message, together with what it publishes."""

    abstract = True
    acks_late = True
    acks_on_failure = True
    acks_on_timeout = False
    reject_on_worker_lost = True
    Request = "celery_eda.task:ReliableRequest"
    #: What gives the ordering key of a call, from its arguments; None if calls have no order.
    ordering_key: Callable[..., Any] | None = None
    #: What decides whether and when a failed attempt is followed by another one; None to leave it
    #: to the setting ``eda_retry_policy``.
    retry_policy: Policy | None = None
    #: What becomes of a key whose message failed for good: ``block`` it until that is repaired or
    #: skipped, or ``skip`` the message.
    when_dead: Literal["block", "skip"] = "block"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = self.request
        if request.called_directly or request.is_eager or _is_running(request.id):
            return super().__call__(*args, **kwargs)
        try:
            return self.app.eda.consumer.deliver(self, args, kwargs)
        except SystemExit as exit_:
            if _ends_with(exit_):
                raise
            raise Reject(exit_, requeue=True) from exit_

    def ask(self, *args: Any, **kwargs: Any) -> Reply[Any]:
        """Ask for a reply to a call with these arguments: ``quote.ask(sku).get(timeout=2)``.

        :meth:`celery_eda.EDA.request` takes options too.

        Raises:
            OutsideTransaction: ``eda_outside`` forbids publishing here.
        """
        reply: Reply[Any] = self.app.eda.request(self, args, kwargs)
        return reply

    def before_start(self, *_: Any) -> None:
        """Nothing yet: a failure here would end a message without a trace of it."""

    def handle(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's function, after the ``before_start`` of the user's class."""
        super().before_start(self.request.id, args, kwargs)
        return self.run(*args, **kwargs)


class TypedTask(Protocol[P, R_co]):
    """A reliable task as a type checker sees it: a Celery task that knows its parameters."""

    name: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    def delay(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...
    def ask(self, *args: P.args, **kwargs: P.kwargs) -> Reply[R_co]: ...
    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any: ...
    def s(self, *args: Any, **kwargs: Any) -> Any: ...
    def si(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...
    def signature(self, args: Any = None, *starargs: Any, **options: Any) -> Any: ...


class HasApp(Protocol):
    """What the decorator needs of the hall."""

    app: Celery

    @property
    def session(self) -> Session: ...


class Decorating(Protocol):
    """``@eda.task(…)`` with options: what it returns decorates the function."""

    @overload
    def __call__(self, function: Callable[Concatenate[Session, P], R], /) -> TypedTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> TypedTask[P, R]: ...


class DecoratingBound(Protocol):
    """``@eda.task(bind=True, …)``: the function's first parameter is the task."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[Any, Session, P], R], /
    ) -> TypedTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], R], /) -> TypedTask[P, R]: ...


class TaskDecorator:
    """``@eda.task``: makes a function a reliable Celery task; takes the options of ``@app.task``.

    With a *key*, the name of a parameter or a function of the arguments, calls with the same key
    take effect in the order in which their transactions committed. When one fails for good those
    behind it wait, unless ``when_dead="skip"`` is given too.

    With a *policy*, a failed attempt is undone and tried again for as long as it says; see
    :class:`celery_eda.RetryPolicy`. With none, the setting ``eda_retry_policy`` decides.

    A function whose first parameter (after ``self``, if bound) is called ``session`` gets the
    session of the message in progress there; callers leave it out.
    """

    def __init__(self, eda: HasApp) -> None:
        self._eda = eda

    @overload
    def __call__(self, function: Callable[Concatenate[Session, P], R], /) -> TypedTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> TypedTask[P, R]: ...
    @overload
    def __call__(
        self,
        /,
        *,
        bind: Literal[True],
        key: Key | None = None,
        policy: Policy | None = None,
        **options: Any,
    ) -> DecoratingBound: ...
    @overload
    def __call__(
        self, /, *, key: Key | None = None, policy: Policy | None = None, **options: Any
    ) -> Decorating: ...
    def __call__(
        self,
        function: Any = None,
        /,
        *,
        key: Key | None = None,
        policy: Policy | None = None,
        **options: Any,
    ) -> Any:
        _refuse_unsafe(options)
        if policy is not None:
            options["retry_policy"] = staticmethod(checked(policy))
        options["base"] = reliable_class(options.get("base", Task))
        # It belongs to the one app whose database keeps it, not to every app of the process.
        options.setdefault("shared", False)
        bound = options.get("bind", False)

        def decorate(function: Callable[..., Any]) -> Any:
            given = self.with_session(function, bound=bound)
            if key is not None:
                key_of = key_function(_without_self(given) if bound else given, key)
                options["ordering_key"] = staticmethod(key_of)
            return self._eda.app.task(**options)(finishing(given))

        return decorate if function is None else decorate(function)

    def with_session(
        self, function: Callable[..., Any], *, bound: bool = False
    ) -> Callable[..., Any]:
        """*function* without its ``session`` parameter, if it has one."""
        signature = inspect.signature(function)
        names = list(signature.parameters)
        position = 1 if bound else 0
        if names[position : position + 1] != ["session"]:
            return function
        eda = self._eda

        @functools.wraps(function)
        def with_session(*args: Any, **kwargs: Any) -> Any:
            return function(*args[:position], eda.session, *args[position:], **kwargs)

        with_session.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[each for each in signature.parameters.values() if each.name != "session"]
        )
        return with_session


def _without_self(function: Callable[..., Any]) -> Callable[..., Any]:
    """A bound task's *function* as its callers see it."""

    def seen() -> None: ...

    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1:]
    seen.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    seen.__qualname__ = function.__qualname__
    return seen


def reliable_class(base: type[Task]) -> type[Task]:
    """*base* as a reliable task class."""
    if issubclass(base, ReliableTask):
        return base
    if base is Task:
        return ReliableTask
    return type(base.__name__, (ReliableTask, base), {"abstract": True})


def finishing(function: Callable[..., Any]) -> Callable[..., Any]:
    """An ``async def`` *function* as one that Celery can call: it returns when it is done.

    Called from an ``async def`` function it can be awaited, as ever.
    """
    if not is_asynchronous(function):
        return function

    @functools.wraps(function)
    def finish(*args: Any, **kwargs: Any) -> Any:
        handler = function(*args, **kwargs)
        return handler if context.running_task() else asyncio.run(handler)

    return finish


def is_asynchronous(function: Callable[..., Any]) -> bool:
    """Whether *function*, or the one it wraps, is an ``async def``."""
    return inspect.iscoroutinefunction(inspect.unwrap(function))


def made_reliable(task: Task) -> None:
    """Make *task*, registered as an ordinary one, reliable in place."""
    if isinstance(task, ReliableTask):
        return
    # With autoretry_for, ``run`` calls ``_orig_run``.
    run = "_orig_run" if hasattr(task, "_orig_run") else "run"
    setattr(task, run, finishing(getattr(task, run)))
    task.__class__ = type(
        type(task).__name__,
        (ReliableTask, type(task)),
        {"__module__": type(task).__module__, "__doc__": type(task).__doc__},
    )


def _refuse_unsafe(options: dict[str, Any]) -> None:
    if options.get("when_dead", "block") not in ("block", "skip"):
        raise ConfigurationError(
            f"when_dead must be 'block' or 'skip', not {options['when_dead']!r}."
        )
    for name in ("acks_late", "acks_on_failure", "acks_on_timeout", "reject_on_worker_lost"):
        if options.get(name, getattr(ReliableTask, name)) != getattr(ReliableTask, name):
            raise UnsafeSetting(
                f"@eda.task needs {name}={getattr(ReliableTask, name)}: with any other value a "
                "killed worker loses the message. Leave the option out, or use @app.task."
            )


def _ends_with(exit_: SystemExit) -> bool:
    """Whether the process, or its worker, may end: Celery then sees to the message.

    In a pool without processes it could not: nobody would ever hear of the message again.
    """
    return type(exit_) is not SystemExit or current_process().name != "MainProcess"


def _is_running(task_id: str) -> bool:
    """Whether a handler calls its own task as a plain function."""
    progress = context.in_progress.get()
    return progress is not None and progress.delivery.task_id == task_id and not progress.finished
