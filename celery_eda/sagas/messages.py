"""The messages that a saga sends: commands to tasks, and wake-ups to itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol
from uuid import UUID

from celery_eda.core import addresses
from celery_eda.core.service import Service
from celery_eda.requests import RequestClient

#: The task that wakes a saga. Its arguments: a :class:`Wakeup`, the saga's id, a record's id.
WAKEUP_TASK = "celery_eda.saga_news"


class Wakeup(str, Enum):
    """The reason to wake a saga. The values travel in messages."""

    timer = "time"
    lock_granted = "lock"
    sub_saga_ended = "end"


class Messages(Protocol):
    """The messages of sagas; :class:`celery_eda.sagas.testing.SagaTest` simulates them."""

    def send_command(
        self, task: str, args: Sequence[Any], kwargs: Mapping[str, Any], **options: Any
    ) -> UUID:
        """Send a command, whose reply comes to this service; returns the id of the request."""
        ...

    def send_wakeup(self, wakeup: Wakeup, saga: str, record: int, **options: Any) -> None:
        """Send a wake-up to this service."""
        ...


@dataclass(frozen=True)
class PublishedMessages:
    """The messages of sagas, published in the current transaction."""

    service: Service
    client: RequestClient

    def send_command(
        self, task: str, args: Sequence[Any], kwargs: Mapping[str, Any], **options: Any
    ) -> UUID:
        reply = self.client.ask(task, args, dict(kwargs), address="durable", **options)
        return UUID(reply.correlation_id)

    def send_wakeup(self, wakeup: Wakeup, saga: str, record: int, **options: Any) -> None:
        self.service.app.send_task(
            WAKEUP_TASK,
            (wakeup.value, saga, record),
            queue=addresses.of_service(self.service.name),
            ignore_result=True,
            **options,
        )
