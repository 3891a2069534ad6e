"""One copy of a message as Celery brings it to a task."""

from __future__ import annotations

from dataclasses import dataclass

from celery import Task

from celery_eda.message import ID_HEADER, REVISION_HEADER, Identity


@dataclass(frozen=True)
class Delivery:
    """One copy of a message, brought to one task."""

    task: Task
    identity: Identity

    @property
    def consumer(self) -> str:
        name: str = self.task.name
        return name

    @property
    def redelivered(self) -> bool:
        """Whether an earlier delivery of the message had no end: its worker was lost."""
        return bool((self.task.request.delivery_info or {}).get("redelivered"))

    @property
    def names(self) -> tuple[str, str]:
        """Of the task and of Celery's id for this call of it, for logs."""
        return self.consumer, self.task.request.id


def identity_of(task: Task) -> Identity:
    """The identity of the message that *task* has in hand.

    Raises:
        ValueError: its headers are malformed.
    """
    headers = {key: task.request.get(key) for key in (ID_HEADER, REVISION_HEADER)}
    return Identity.of_headers(headers) or foreign(task)


def foreign(task: Task) -> Identity:
    """The identity of a message that came without one: its publisher does not use this system."""
    request = task.request
    return Identity.of_foreign(request.id, request.retries or 0, request.replaced_task_nesting or 0)
