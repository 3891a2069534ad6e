"""One copy of a message as Celery brings it to a task."""

from __future__ import annotations

from dataclasses import dataclass

from celery import Task

from celery_eda import addresses
from celery_eda.addresses import REPLY_HEADER
from celery_eda.message import HEADERS, Identity, Position


@dataclass(frozen=True)
class Delivery:
    """One copy of a message, brought to one task.

    Attributes:
        position: its place in its key's order, None if it has none.
        reply_to: where its reply goes, None if nobody asks for one.
    """

    task: Task
    identity: Identity
    position: Position | None = None
    reply_to: str | None = None

    @classmethod
    def of(cls, task: Task) -> Delivery:
        """The message that *task* has in hand.

        Raises:
            ValueError: its headers are malformed.
        """
        headers = {key: task.request.get(key) for key in (*HEADERS, REPLY_HEADER)}
        identity = Identity.of_headers(headers) or foreign(task)
        return cls(task, identity, Position.of_headers(headers), addresses.of_headers(headers))

    @property
    def consumer(self) -> str:
        name: str = self.task.name
        return name

    @property
    def retries(self) -> int:
        """How many attempts at the message were made before this one."""
        retries: int = self.task.request.retries or 0
        return retries

    @property
    def redelivered(self) -> bool:
        """Whether an earlier delivery of the message had no end: its worker was lost."""
        return bool((self.task.request.delivery_info or {}).get("redelivered"))

    @property
    def names(self) -> tuple[str, str]:
        """Of the task and of Celery's id for this call of it, for logs."""
        return self.consumer, self.task.request.id


def foreign(task: Task) -> Identity:
    """The identity of a message that came without one: its publisher does not use this system."""
    request = task.request
    return Identity.of_foreign(request.id, request.retries or 0, request.replaced_task_nesting or 0)
