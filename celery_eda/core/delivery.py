"""One copy of a message, as Celery delivers it to a task."""

from __future__ import annotations

from dataclasses import dataclass

from celery import Task
from celery.app.task import Context

from celery_eda.core import addresses
from celery_eda.core.addresses import REPLY_HEADER
from celery_eda.core.identity import (
    DRAIN,
    HEADERS,
    ID_HEADER,
    VERDICT,
    WIRE,
    Identity,
    Position,
)
from celery_eda.core.message import PROPERTIES, Message, Wire

# Attributes of its class are no headers for Celery, which shows all others as `request.headers`.
for _name in (WIRE, VERDICT, DRAIN):
    setattr(Context, _name, None)


@dataclass(frozen=True)
class Delivery:
    """One copy of a message, delivered to one task.

    Attributes:
        request: Celery's record of this call. A task that calls itself as a plain function has
            another one meanwhile, so that ``task.request`` is no substitute.
        position: the message's position in its key's order, None if it has no key.
        reply_to: the address for the reply, None if none is wanted.
    """

    task: Task
    request: Context
    identity: Identity
    position: Position | None = None
    reply_to: str | None = None

    @classmethod
    def of(cls, task: Task) -> Delivery:
        """The delivery that *task* is being called for.

        Raises:
            ValueError: its headers are malformed.
        """
        request = task.request
        headers = {key: request.get(key) for key in (*HEADERS, REPLY_HEADER)}
        return cls(
            task,
            request,
            Identity.of_headers(headers) or request.get(WIRE).foreign_identity,
            Position.of_headers(headers),
            addresses.of_headers(headers),
        )

    @classmethod
    def malformed(cls, task: Task) -> Delivery:
        """The delivery of a message whose headers :meth:`of` refuses."""
        return cls(task, task.request, task.request.get(WIRE).foreign_identity)

    @property
    def consumer(self) -> str:
        """Name of the task, under which the inbox records its messages."""
        name: str = self.task.name
        return name

    @property
    def task_id(self) -> str:
        """Celery's id of the call; retries and replacements of a task have the same one."""
        task_id: str = self.request.id
        return task_id

    @property
    def retries(self) -> int:
        """Number of attempts made at the message before this one."""
        retries: int = self.request.retries or 0
        return retries

    @property
    def redelivered(self) -> bool:
        """True if an earlier delivery of the message had no outcome: its worker was lost."""
        return bool((self.request.delivery_info or {}).get("redelivered"))

    @property
    def is_foreign(self) -> bool:
        """True if the publisher, which does not use this package, gave the message no identity."""
        return self.request.get(ID_HEADER) is None

    @property
    def log_name(self) -> str:
        """``task[id]``, with Celery's id of the call, as in Celery's own log lines."""
        return f"{self.consumer}[{self.task_id}]"

    def as_message(self) -> Message:
        """The message as it arrived, ready to be sent again; without its expiration."""
        wire: Wire = self.request.get(WIRE)
        info = self.request.delivery_info or {}
        headers = {**wire.headers, **self.identity.headers}
        headers.pop("compression", None)  # kombu has decompressed the body
        return Message(
            identity=self.identity,
            task=self.consumer,
            body=wire.body,
            content_type=wire.content_type,
            content_encoding=wire.content_encoding,
            headers=headers,
            properties={
                name: wire.properties[name] for name in PROPERTIES & wire.properties.keys()
            },
            exchange=info.get("exchange") or "",
            routing_key=info.get("routing_key") or "",
        )
