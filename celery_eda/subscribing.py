"""``@eda.on``: makes a function a handler of events."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

from celery import Celery

from celery_eda import context
from celery_eda.errors import ConfigurationError
from celery_eda.event import Event
from celery_eda.event_types import EventTypes
from celery_eda.subscriptions import Subscription, Subscriptions
from celery_eda.task import TaskDecorator, finishing

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
        self, *patterns: str, name: str | None = None, ordered: bool = False, **options: Any
    ) -> Callable[[Callable[..., Any]], Any]:
        """Subscribe to the events that one of *patterns* chooses.

        Args:
            patterns: as AMQP has them: ``*`` is any one word, ``#`` any number of words.
            name: of the task and, with the service's, of the queue; by default that of the
                function. A changed name leaves a queue behind.
            ordered: whether the events of one category and key are handled one after the other, in
                the order of their commits, whatever their names.
            options: those of ``@eda.task``, but for ``bind``, ``key`` and ``ignore_result``.

        Raises:
            ConfigurationError: it cannot be subscribed so.
            InvalidEvent: a pattern is none.
        """
        if refused := sorted(OURS & options.keys()):
            raise ConfigurationError(
                f"A subscription decides itself about {', '.join(refused)}: it gets the event, "
                "whose key is that of its order, and nobody waits for a result. Leave it out."
            )

        def decorate(function: Callable[..., Any]) -> Any:
            eda = self._eda
            task = name or eda.app.gen_task_name(function.__name__, function.__module__)
            subscription = Subscription(task, patterns, ordered)
            eda.subscriptions.add(subscription)
            handle = finishing(eda.task.with_session(function))

            @wraps(function, assigned=("__module__", "__doc__"))
            def receive(attributes: Any) -> Any:
                event = eda.event_types.restored(Event.of_cloud(attributes))
                if not subscription.wants(event.type):
                    return None
                with context.handling(event):
                    return handle(event)

            del receive.__wrapped__  # Celery would take the function's parameters for its own
            return eda.task(name=task, ignore_result=True, **options)(receive)

        return decorate
