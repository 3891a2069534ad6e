"""``@eda.on`` and ``@eda.projection``: turn functions into handlers of events."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

from celery import Celery
from sqlalchemy import Table

from celery_eda.core import context
from celery_eda.core.event import Event
from celery_eda.core.identity import ORDER_HEADER, REPLAY_HEADER
from celery_eda.core.service import Service
from celery_eda.core.silence import silenced
from celery_eda.errors import ConfigurationError, InvalidEvent
from celery_eda.events.projections.projection import Apply, Projection
from celery_eda.events.registry import EventRegistry
from celery_eda.events.subscriptions import Subscription
from celery_eda.events.wiring import Events
from celery_eda.inbox import TaskDecorator, run_async

#: Options of a task that a subscription sets itself.
FIXED_OPTIONS = frozenset(["bind", "key", "ignore_result"])


@dataclass(frozen=True)
class EventHandler:
    """Calls a user's function with an event of the latest version, of its registered class."""

    types: EventRegistry
    function: Callable[..., Any]

    def __call__(self, event: Event) -> Any:
        event = self.types.restored(event)
        with context.handling(event):
            return self.function(event)


@dataclass(frozen=True)
class ProjectionHandler:
    """Applies an event to the table of a projection."""

    events: Events
    projection: Projection

    def __call__(self, event: Event) -> None:
        event = replace(event, order=_order_in_progress())
        self.events.rebuild.apply(context.current_session().connection(), self.projection, event)


@dataclass(frozen=True)
class EventReceiver:
    """Passes the events of a subscription, as they arrive in messages, to its handler."""

    app: Celery
    subscription: Subscription
    handle: Callable[[Event], Any]

    def receive(self, attributes: Any) -> Any:
        """Handle the event with these CloudEvents *attributes*, if the subscription wants it."""
        event = Event.of_cloud(attributes)
        order = _order_in_progress()
        if order is not None and event.lane != order[:3]:
            raise InvalidEvent("the position of the event is that of another source, scope or key")
        if not self.subscription.all and not self.subscription.wants(event.type):
            return None
        with self._scope():
            return self.handle(event)

    def _scope(self) -> AbstractContextManager[None]:
        """A scope in which nothing can be published, if the message in progress is a replay."""
        task = self.app.current_worker_task
        if task is not None and task.request.get(REPLAY_HEADER):
            return silenced(f"The replay to {self.subscription.task}")
        return nullcontext()


class SubscriptionDecorator:
    """``@eda.on("order.*")``: makes a function a handler of events, from any service.

    The function becomes a reliable task with a queue of its own. The queue exists, and collects
    events, from the first start of a worker or relay of this app on. The function is called with
    the :class:`celery_eda.Event`, after the session of the message in progress if its first
    parameter is called ``session``. Its writes and messages are committed together. Each
    subscription handles each event exactly once, with retries, repairs and dead letters of its own.
    """

    def __init__(self, service: Service, events: Events, task: TaskDecorator) -> None:
        self._service = service
        self._events = events
        self._task = task

    def __call__(
        self,
        *patterns: str,
        name: str | None = None,
        ordered: bool = False,
        every_worker: bool = False,
        **options: Any,
    ) -> Callable[[Callable[..., Any]], Any]:
        """Subscribe to the events whose names match one of *patterns*.

        Args:
            patterns: as in AMQP: ``*`` matches one word, ``#`` any number of words.
            name: of the task, by default that of the function; also the last part of the queue's
                name, so a new name leaves the old queue behind.
            ordered: True to handle the events of one category and key one after the other, in the
                order of their commits, whatever their types.
            every_worker: True to call the function in every running worker, e.g. to empty a cache.
                The task is a plain one then, without a transaction: a worker misses events while it
                is down, and an event in progress when it dies, and may get an event twice. In a
                pool of processes one process gets the event; a cache in memory needs threads.
            options: options of ``@eda.task``, or of ``@app.task`` with *every_worker*, except
                ``bind``, ``key`` and ``ignore_result``.

        Raises:
            ConfigurationError: the options contradict each other.
            InvalidEvent: a pattern is malformed.
        """

        def decorate(function: Callable[..., Any]) -> Any:
            subscription = Subscription(
                self._task_name(function, name), patterns, ordered, every_worker=every_worker
            )
            if every_worker:
                _refuse_session(subscription, function)
            handler = EventHandler(
                self._events.registry, run_async(self._task.with_session(function))
            )
            return self._subscribe(subscription, handler, function, options)

        return decorate

    def projection(
        self, *patterns: str, table: Table, name: str | None = None, **options: Any
    ) -> Callable[[Apply], Projection]:
        """Make a function the projection of a table; see :meth:`celery_eda.EDA.projection`."""

        def decorate(function: Apply) -> Projection:
            projection = Projection(self._task_name(function, name), table, function)
            self._events.projections.add(projection)
            subscription = Subscription(projection.name, patterns, ordered=True, all=True)
            handler = ProjectionHandler(self._events, projection)
            self._subscribe(subscription, handler, function, options)
            return projection

        return decorate

    def _task_name(self, function: Callable[..., Any], name: str | None) -> str:
        """*name*, or the one that Celery gives to a task of *function*."""
        return name or str(self._service.app.gen_task_name(function.__name__, function.__module__))

    def _subscribe(
        self,
        subscription: Subscription,
        handle: Callable[[Event], Any],
        function: Callable[..., Any],
        options: dict[str, Any],
    ) -> Any:
        """Register *subscription*, and return its task."""
        if refused := sorted(FIXED_OPTIONS & options.keys()):
            raise ConfigurationError(
                f"A subscription does not accept {', '.join(refused)}: its only argument is the "
                "event, its order is that of the event's key, and it has no result. Remove the "
                "option."
            )
        self._events.subscriptions.add(subscription)
        receiver = EventReceiver(self._service.app, subscription, handle)
        options = {"name": subscription.task, "ignore_result": True, **options}
        if subscription.every_worker:
            return self._service.app.task(shared=False, reliable=False, **options)(
                _task_function(receiver, function)
            )
        return self._task(**options)(_task_function(receiver, function))


def _task_function(receiver: EventReceiver, function: Callable[..., Any]) -> Callable[[Any], Any]:
    """The function of a subscription's task, with the module and docs of the user's *function*."""

    @wraps(function, assigned=("__module__", "__doc__"))
    def receive(attributes: Any) -> Any:
        return receiver.receive(attributes)

    # Celery would check calls against the parameters of the wrapped function.
    del receive.__wrapped__
    return receive


def _refuse_session(subscription: Subscription, function: Callable[..., Any]) -> None:
    if next(iter(inspect.signature(function).parameters), "") == "session":
        raise ConfigurationError(
            f"{subscription.task} is called in every worker, without a transaction, so it has no "
            "session. Leave out the parameter, or every_worker."
        )


def _order_in_progress() -> tuple[Any, ...] | None:
    """The position of the message in progress, in the shape of :attr:`Event.order`."""
    progress = context.in_progress.get()
    if progress is None or progress.finished or progress.delivery.position is None:
        return None
    return tuple(progress.delivery.position.headers[ORDER_HEADER])
