"""``@eda.on``: makes a function a handler of events."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import wraps
from typing import Any, Protocol

from celery import Celery
from sqlalchemy import Table
from sqlalchemy.orm import Session

from celery_eda import context
from celery_eda.decorator import TaskDecorator
from celery_eda.errors import ConfigurationError
from celery_eda.event import Event
from celery_eda.event_types import EventTypes
from celery_eda.identity import ORDER_HEADER, REPLAY_HEADER
from celery_eda.projecting import Projecting
from celery_eda.projections import Apply, Projection, Projections
from celery_eda.subscriptions import Subscription, Subscriptions
from celery_eda.task import run_async

#: Options of a task that a subscription decides on itself.
OURS = frozenset(("bind", "key", "ignore_result"))


class Subscribes(Protocol):
    """What the decorator needs of a service."""

    app: Celery
    task: TaskDecorator

    @property
    def subscriptions(self) -> Subscriptions: ...

    @property
    def event_types(self) -> EventTypes: ...

    @property
    def projections(self) -> Projections: ...

    @property
    def projecting(self) -> Projecting: ...

    @property
    def session(self) -> Session: ...


class SubscriptionDecorator:
    """``@eda.on("order.*")``: lets a function handle events of any service.

    It becomes a reliable task with a queue of its own, which is there, and filled, once a worker or
    a relay of this app has started. The function gets the :class:`celery_eda.Event`, and in front
    of it the session of the message in progress if its first parameter is called ``session``; what
    it writes and publishes is committed together. Each subscription takes effect once with each
    event, and its retries, repairs and dead letters are its own.
    """

    def __init__(self, eda: Subscribes) -> None:
        self._eda = eda

    def __call__(
        self,
        *patterns: str,
        name: str | None = None,
        ordered: bool = False,
        every_worker: bool = False,
        **options: Any,
    ) -> Callable[[Callable[..., Any]], Any]:
        """Subscribe to the events that one of *patterns* chooses.

        Args:
            patterns: as AMQP has them: ``*`` is any one word, ``#`` any number of words.
            name: of the task and, with the service's, of the queue; by default that of the
                function. A changed name leaves a queue behind.
            ordered: whether the events of one category and key are handled one after the other, in
                the order of their commits, whatever their names.
            every_worker: whether each worker gets every event that happens while it runs, e.g. to
                empty a cache. It then is a plain task, in no transaction: what happens while a
                worker is away, or is in its hands when it dies, is missed. With a pool of
                processes one of them gets it; a cache in memory needs threads.
            options: those of ``@eda.task``, or of ``@app.task`` for every worker, but for ``bind``,
                ``key`` and ``ignore_result``.

        Raises:
            ConfigurationError: it cannot be subscribed so.
            InvalidEvent: a pattern is none.
        """

        def decorate(function: Callable[..., Any]) -> Any:
            eda = self._eda
            task = name or eda.app.gen_task_name(function.__name__, function.__module__)
            if every_worker and next(iter(inspect.signature(function).parameters), "") == "session":
                raise ConfigurationError(
                    f"{task} is called in every worker, in no transaction, so there is no session "
                    "for it. Leave out the parameter, or every_worker."
                )
            handle = run_async(eda.task.with_session(function))

            def receive(event: Event) -> Any:
                event = eda.event_types.restored(event)
                with context.handling(event):
                    return handle(event)

            subscription = Subscription(task, patterns, ordered, every_worker=every_worker)
            return self._subscribe(subscription, receive, function, options)

        return decorate

    def projection(
        self, *patterns: str, table: Table, name: str | None = None, **options: Any
    ) -> Callable[[Apply], Projection]:
        """Let a function make the rows of a table; see :meth:`celery_eda.EDA.projection`."""

        def decorate(function: Apply) -> Projection:
            eda = self._eda
            task = name or eda.app.gen_task_name(function.__name__, function.__module__)
            projection = Projection(task, table, function)
            eda.projections.add(projection)

            def receive(event: Event) -> None:
                event = replace(event, order=_place_in_progress())
                eda.projecting.take(eda.session.connection(), projection, event)

            subscription = Subscription(task, patterns, ordered=True, all=True)
            self._subscribe(subscription, receive, function, options)
            return projection

        return decorate

    def _subscribe(
        self,
        subscription: Subscription,
        receive: Callable[[Event], Any],
        function: Callable[..., Any],
        options: dict[str, Any],
    ) -> Any:
        """Make a task of what *receive* does with each event that comes to *subscription*."""
        if refused := sorted(OURS & options.keys()):
            raise ConfigurationError(
                f"A subscription decides itself about {', '.join(refused)}: it gets the event, "
                "whose key is that of its order, and nobody waits for a result. Leave it out."
            )
        self._eda.subscriptions.add(subscription)

        @wraps(function, assigned=("__module__", "__doc__"))
        def take(attributes: Any) -> Any:
            event = Event.of_cloud(attributes)
            if subscription.all or subscription.wants(event.type):
                with _silenced_by_replay(self._eda.app, subscription):
                    return receive(event)
            return None

        del take.__wrapped__  # Celery would take the function's parameters for its own
        options = {"name": subscription.task, "ignore_result": True, **options}
        if subscription.every_worker:
            return self._eda.app.task(shared=False, **options)(take)
        return self._eda.task(**options)(take)


def _silenced_by_replay(app: Celery, subscription: Subscription) -> AbstractContextManager[None]:
    """Where nothing can be published, if the event in progress is replayed."""
    task = app.current_worker_task
    if task is not None and task.request.get(REPLAY_HEADER):
        return context.silenced(f"The replay to {subscription.task}")
    return nullcontext()


def _place_in_progress() -> tuple[Any, ...] | None:
    """The place of the message in progress, as an event has it."""
    progress = context.in_progress.get()
    if progress is None or progress.delivery.position is None:
        return None
    return tuple(progress.delivery.position.headers[ORDER_HEADER])
