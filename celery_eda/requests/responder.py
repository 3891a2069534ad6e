"""The responder's side of a request: the reply leaves in the transaction that did the work.

So a reply is sent if and only if the work is committed. A task that takes the place of the one
asked, such as another attempt or a replacement, gets the reply address and replies instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from kombu import Queue

from celery_eda.core import addresses, context, redaction
from celery_eda.core.addresses import REPLY_TASK
from celery_eda.core.context import Collected
from celery_eda.core.delivery import Delivery
from celery_eda.core.identity import Identity
from celery_eda.core.message import Message
from celery_eda.core.service import Service
from celery_eda.requests.remote_errors import RemoteErrors


@dataclass(frozen=True)
class Responder:
    """Replies to requests, each by an ordinary message of the current transaction."""

    service: Service
    errors: RemoteErrors

    def succeed(self, delivery: Delivery, result: Any) -> None:
        """Reply with *result*, if the message is a request."""
        if delivery.reply_to is not None:
            self._send(delivery, delivery.reply_to, {"result": result})

    def fail(self, delivery: Delivery, error: Exception) -> None:
        """Reply that the request failed for good, if the message is one."""
        if delivery.reply_to is not None:
            described = self.errors.to_wire(error, redaction.secrets_in_progress())
            self._send(delivery, delivery.reply_to, {"error": described})

    def refuse(self, request: Message, error: Exception) -> list[Message]:
        """The reply to a *request* that no task handles; empty if the message is not a request."""
        try:
            address = addresses.of_headers(request.headers)
            task_id = str(UUID(request.headers["id"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            return []
        if address is None:
            return []
        collected = Collected()
        with context.scope_of(collected):
            outcome = {"error": self.errors.to_wire(error)}
            self._publish(address, _identity(request.identity, ""), task_id, None, outcome)
        return collected.messages

    def _send(self, delivery: Delivery, address: str, outcome: Mapping[str, Any]) -> None:
        """Publish the one reply of an attempt; the reply of a copy is a copy of it."""
        identity = _identity(delivery.identity, delivery.consumer)
        request = delivery.request
        self._publish(address, identity, request.id, request.root_id, outcome)

    def _publish(
        self,
        address: str,
        identity: Identity,
        correlation_id: str,
        root_id: str | None,
        outcome: Mapping[str, Any],
    ) -> None:
        amqp = self.service.app.amqp
        message = amqp.as_task_v2(
            str(identity.id),
            REPLY_TASK,
            (correlation_id, outcome),
            root_id=root_id,
            parent_id=correlation_id,
            ignore_result=True,
            argsrepr="(…)",  # keeps results out of the logs
            kwargsrepr="{}",
        )
        amqp.send_task_message(
            None,
            REPLY_TASK,
            message,
            queue=Queue(address),
            declare=[],
            serializer=self.service.app.conf.result_serializer,
            eda_identity=identity,
        )


def _identity(request: Identity, consumer: str) -> Identity:
    """The identity of the reply to one attempt at a request, the same for every copy of it."""
    return Identity.of_foreign(f"{request.id} {consumer}", request.revision, 0)
