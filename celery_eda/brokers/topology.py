"""Queues and exchanges, declared before the first message to them."""

from __future__ import annotations

import logging
from typing import Any, Protocol

from amqp.exceptions import PreconditionFailed
from celery import Celery
from kombu.common import Broadcast

from celery_eda.core.service import Service, service_of

log = logging.getLogger(__name__)

#: The names of queues of celery_eda begin with it.
PREFIX = "eda."


class Declares(Protocol):
    """Declares an exchange and the queues that are bound to it."""

    def declare(self, channel: Any) -> None:
        """Declare them over *channel*, kombu's. Repeating it is harmless."""
        ...


class Topology:
    """The queues that one app publishes to, by name.

    Attributes:
        exchanges: the declarer of each exchange that no queue of the app is bound to, by the name
            of the exchange.
        own_queues: the names of queues of celery_eda that do not begin with :data:`PREFIX`.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.exchanges: dict[str, Declares] = {}
        self.own_queues: set[str] = set()
        service.add(self)

    def declare(self, channel: Any, name: str) -> None:
        """Declare the queue *name* with its exchange and bindings, or the exchange *name*.

        Of a broadcast only the exchange is declared: each consumer declares a queue of its own.

        Raises:
            KeyError: there is no such queue, and the app does not create missing ones.
        """
        if exchange := self.exchanges.get(name):
            exchange.declare(channel)
            return
        queue = self._service.app.amqp.queues[name]
        entity = queue.exchange if isinstance(queue, Broadcast) else queue
        try:
            entity.bind(channel).declare()
        except PreconditionFailed as error:
            if not is_own(self._service, name):
                raise
            log.info("the queue %s exists with other arguments and is used: %s", name, error)


def declare(app: Celery, channel: Any, name: str) -> None:
    """Declare the queue or exchange *name* of *app*; see :meth:`Topology.declare`."""
    service_of(app).wing(Topology).declare(channel, name)


def is_own(service: Service, name: str) -> bool:
    """True if *name* is that of a queue of celery_eda, not of the app."""
    return (
        name.startswith(PREFIX)
        or name == service.settings.repair_queue
        or name in service.wing(Topology).own_queues
    )
