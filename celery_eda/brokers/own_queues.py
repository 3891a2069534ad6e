"""Queues of celery_eda itself: for replies, repairs, and subscriptions to events.

They are quorum queues where the app has quorum queues, and exist even if the app creates no missing
queues. One that exists with other arguments, because another service or an older configuration
declared it first, is used as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from celery.app.amqp import Queues
from kombu import Queue

from celery_eda.brokers.rabbitmq import dead_letter_exchange
from celery_eda.brokers.topology import Topology, is_own
from celery_eda.core.service import Service

QUORUM = "quorum"
TYPE = "x-queue-type"


def arguments_of(service: Service) -> dict[str, Any]:
    """The arguments of a durable queue of our own."""
    if not _has_quorum_queues(service.app.conf):
        return {}
    limit = service.settings.delivery_limit
    limited = dead_letter_exchange.queue_arguments(limit, service.name) if limit else {}
    return {**limited, TYPE: QUORUM}


def add(service: Service, name: str) -> None:
    """Make *name* that of a queue of our own, which exists without a definition in the app."""
    service.wing(Topology).own_queues.add(name)


def with_own_queues(base: type[Queues], service: Service) -> type[Queues]:
    """A subclass of *base*, Celery's collection of queues, that can make every queue of ours."""

    class OwnQueues(base):
        def __missing__(self, name: str) -> Queue:
            if not is_own(service, name):
                return super().__missing__(name)
            arguments = arguments_of(service) or None
            own = Queue(name, self.autoexchange(name), name, queue_arguments=arguments)
            return self.add(own)

    return OwnQueues


def _has_quorum_queues(conf: Any) -> bool:
    types = (conf.task_default_queue_type, conf.task_create_missing_queue_type)
    return QUORUM in types or any(each.get(TYPE) == QUORUM for each in _arguments(conf))


def _arguments(conf: Any) -> Iterator[Mapping[str, Any]]:
    """The arguments of each queue in the setting ``task_queues``."""
    queues = conf.task_queues or ()
    for each in queues.values() if isinstance(queues, Mapping) else queues:
        given = each if isinstance(each, Mapping) else vars(each)
        yield given.get("queue_arguments") or {}
