"""The responder's side of a request: the reply leaves in the transaction that did the work.

So it is sent if and only if the work was committed. A copy of the request is answered with what
was recorded for the first one. Whoever takes a task's place (another attempt, a replacement) is
handed the address, and answers instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from celery import Celery
from kombu import Queue

from celery_eda import addresses, context, handling, redaction
from celery_eda.addresses import REPLY_HEADER
from celery_eda.context import Collected
from celery_eda.delivery import Delivery
from celery_eda.handling import HandlerResult
from celery_eda.identity import Identity
from celery_eda.inbox import Outcome, RecordedOutcome
from celery_eda.message import Message
from celery_eda.remote_errors import RemoteErrors
from celery_eda.unit_of_work import UnitOfWork

#: The task that a reply is a call of: with a correlation id and an outcome.
REPLY_TASK = "celery_eda.reply"


@dataclass(frozen=True)
class Responder:
    """Answers requests, each by an ordinary message of the transaction in progress."""

    app: Celery
    errors: RemoteErrors

    def answer(self, unit: UnitOfWork, ending: HandlerResult) -> None:
        """Say with what the handler ended, unless something else takes its place."""
        if unit.delivery.reply_to is None or unit.progress.replier:
            return
        if ending.ignored:
            self.fail(unit.delivery, ending.ignored)
        else:
            self._send(unit.delivery, {"result": ending.result})

    def fail(self, delivery: Delivery, error: Exception) -> None:
        """Say that the request failed for good, if somebody wants to know."""
        if delivery.reply_to is not None:
            described = self.errors.to_wire(error, redaction.secrets_in_hand())
            self._send(delivery, {"error": described})

    def repeat(self, unit: UnitOfWork, handled: RecordedOutcome) -> None:
        """Answer a copy as the first one was answered, if that had an end of its own."""
        if unit.delivery.reply_to is None or handled.outcome not in (Outcome.done, Outcome.dead):
            return
        value = handling.decoded(unit.delivery.task, handled.result)
        if handled.outcome is Outcome.done:
            self._send(unit.delivery, {"result": value})
        elif isinstance(value, Exception):
            self.fail(unit.delivery, value)
        unit.commit()
        unit.outgoing.hand_off()

    def to_refused(self, request: Message, error: Exception) -> list[Message]:
        """The reply to a *request* that no task gets to see, if it can be replied to."""
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

    def _send(self, delivery: Delivery, outcome: Mapping[str, Any]) -> None:
        """Publish the one reply of an attempt; a second one is a copy of it."""
        assert delivery.reply_to is not None, "nobody asks for a reply"
        request = delivery.request
        identity = _identity(delivery.identity, delivery.consumer)
        self._publish(delivery.reply_to, identity, request.id, request.root_id, outcome)

    def _publish(
        self,
        address: str,
        identity: Identity,
        correlation_id: str,
        root_id: str | None,
        outcome: Mapping[str, Any],
    ) -> None:
        amqp = self.app.amqp
        message = amqp.as_task_v2(
            str(identity.id),
            REPLY_TASK,
            (correlation_id, outcome),
            root_id=root_id,
            parent_id=correlation_id,
            ignore_result=True,
            argsrepr="(…)",  # results are nothing for logs
            kwargsrepr="{}",
        )
        amqp.send_task_message(
            None,
            REPLY_TASK,
            message,
            queue=Queue(address),
            declare=[],
            serializer=self.app.conf.result_serializer,
            eda_identity=identity,
        )


def _identity(request: Identity, consumer: str) -> Identity:
    """That of the reply to one attempt at a request: the same for every copy of it."""
    return Identity.of_foreign(f"{request.id} {consumer}", request.revision, 0)


def hand_on(address: str, task_id: str, message: Any) -> bool:
    """Write *address* into whatever of a task *message* takes the place of the task *task_id*.

    That is the message itself if it replaces the task, or else what stands in it for later: the
    last one of a chain, or what completes a chord.

    Returns:
        Whether there is such a thing.
    """
    if message.headers["id"] == task_id and message.headers["replaced_task_nesting"]:
        message.headers[REPLY_HEADER] = address
        return True
    embedded = message.body[2]
    places = [
        place
        for signature in (*(embedded["chain"] or ()), embedded["chord"])
        for place in _places(signature, task_id)
    ]
    for options in places:
        options["headers"] = {**(options.get("headers") or {}), REPLY_HEADER: address}
    return bool(places)


def _places(signature: Any, task_id: str) -> Iterator[MutableMapping[str, Any]]:
    """The options of what in *signature*, however complex, will have the id *task_id*."""
    match signature:
        case {"kwargs": {"tasks": [*_, last]}} | {"kwargs": {"body": Mapping() as last}}:
            yield from _places(last, task_id)
        case {"options": {"task_id": given} as options} if given == task_id:
            yield options
