"""``@eda.task``: makes a function a reliable task, and keeps its signature for type checkers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

from celery import Task
from sqlalchemy.orm import Session

from celery_eda.core.context import current_session
from celery_eda.core.retry import Policy, checked_policy
from celery_eda.core.service import Service
from celery_eda.errors import ConfigurationError, UnsafeSetting
from celery_eda.inbox.safety import SAFE, unsafe_options
from celery_eda.inbox.task import reliable_class, run_async
from celery_eda.ordering import Key, key_function
from celery_eda.requests import Reply

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class TypedTask(Protocol[P, R_co]):
    """A reliable task for type checkers: a Celery task with the parameters of its function."""

    name: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    def delay(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...
    def ask(self, *args: P.args, **kwargs: P.kwargs) -> Reply[R_co]: ...
    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any: ...
    def s(self, *args: Any, **kwargs: Any) -> Any: ...
    def si(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...
    def signature(self, args: Any = None, *starargs: Any, **options: Any) -> Any: ...


class Decorating(Protocol):
    """The type of ``@eda.task(…)`` with options: it decorates the function."""

    @overload
    def __call__(self, function: Callable[Concatenate[Session, P], R], /) -> TypedTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> TypedTask[P, R]: ...


class DecoratingBound(Protocol):
    """The type of ``@eda.task(bind=True, …)``: the function's first parameter is the task."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[Any, Session, P], R], /
    ) -> TypedTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], R], /) -> TypedTask[P, R]: ...


class TaskDecorator:
    """``@eda.task``: makes a function a reliable Celery task; takes the options of ``@app.task``.

    With a *key*, the name of a parameter or a function of the arguments, calls with the same key
    take effect in the order in which their transactions committed. When one fails for good, the
    calls behind it wait for its repair, unless ``when_dead="skip"`` is given too.

    With a *policy*, a failed attempt is rolled back and made again when the policy says so; see
    :class:`celery_eda.RetryPolicy`. Without one, the setting ``eda_retry_policy`` decides.

    A function whose first parameter (after ``self``, if bound) is called ``session`` gets the
    session of the message in progress there; callers leave it out.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

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
            options["retry_policy"] = staticmethod(checked_policy(policy))
        options["base"] = reliable_class(options.get("base", Task))
        # A shared task would be added to every app of the process, and to their databases.
        options.setdefault("shared", False)
        bound = options.get("bind", False)

        def decorate(function: Callable[..., Any]) -> Any:
            given = self.with_session(function, bound=bound)
            if key is not None:
                key_of = key_function(_without_self(given) if bound else given, key)
                options["ordering_key"] = staticmethod(key_of)
            return self._service.app.task(**options)(run_async(given))

        return decorate if function is None else decorate(function)

    def with_session(
        self, function: Callable[..., Any], *, bound: bool = False
    ) -> Callable[..., Any]:
        """*function* with its ``session`` parameter, if it has one, filled in at each call."""
        signature = inspect.signature(function)
        names = list(signature.parameters)
        position = 1 if bound else 0
        if names[position : position + 1] != ["session"]:
            return function

        @functools.wraps(function)
        def with_session(*args: Any, **kwargs: Any) -> Any:
            return function(*args[:position], current_session(), *args[position:], **kwargs)

        with_session.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[each for each in signature.parameters.values() if each.name != "session"]
        )
        return with_session


def _without_self(function: Callable[..., Any]) -> Callable[..., Any]:
    """A bound task's *function* without its first parameter, as its callers see it."""

    def seen() -> None: ...

    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1:]
    seen.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    seen.__qualname__ = function.__qualname__
    return seen


def _refuse_unsafe(options: dict[str, Any]) -> None:
    """Check the options of a task.

    Raises:
        ConfigurationError: one of them is wrong.
        UnsafeSetting: with one of them a message could be lost.
    """
    if options.get("when_dead", "block") not in ("block", "skip"):
        raise ConfigurationError(
            f"when_dead must be 'block' or 'skip', not {options['when_dead']!r}."
        )
    for name in unsafe_options(options):
        raise UnsafeSetting(
            f"@eda.task needs {name}={SAFE[name]}: with any other value a worker that is killed "
            "loses the message or repeats its effect. Leave the option out, or use @app.task."
        )
