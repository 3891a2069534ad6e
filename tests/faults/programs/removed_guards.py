"""The road with one guard removed: each function here takes away what a test claims is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import bootsteps
from celery.exceptions import Ignore, Retry
from celery.worker.request import Request
from kombu import Connection
from kombu.transport import redis
from sqlalchemy import Connection as DatabaseConnection

from celery_eda.brokers.base import CONFIRMED
from celery_eda.brokers.rabbitmq import confirm_channel, envelopes
from celery_eda.core.addresses import REPLY_TASK
from celery_eda.core.identity import Identity, Position
from celery_eda.databases.dialect import Dialect
from celery_eda.databases.mysql import MySQL
from celery_eda.databases.postgresql import PostgreSQL
from celery_eda.inbox import handler, safety, task
from celery_eda.inbox.attempts import Attempts
from celery_eda.inbox.intake import Intake
from celery_eda.inbox.local_delivery import ParkedMessage
from celery_eda.inbox.ordering import TurnKeeper
from celery_eda.inbox.request import ReliableRequest
from celery_eda.inbox.store import InboxStore
from celery_eda.inbox.task import ReliableTask
from celery_eda.outbox import chords, settlement
from celery_eda.outbox.capture import amqp
from celery_eda.outbox.store import OutboxStore
from celery_eda.requests.responder import Responder


def no_inbox() -> None:
    InboxStore.admit = lambda *_: None  # type: ignore[method-assign,assign,return-value]
    InboxStore.record = lambda *_: True  # type: ignore[method-assign,assign,return-value]


def inbox_in_another_transaction() -> None:
    admit = InboxStore.admit

    def admit_apart(self: InboxStore, connection: DatabaseConnection, *arguments: Any) -> Any:
        with connection.engine.begin() as another:
            return admit(self, another, *arguments)

    InboxStore.admit = admit_apart  # type: ignore[method-assign]


def no_confirm() -> None:
    write = confirm_channel.ConfirmChannel.write

    def write_and_hope(self: Any, unsent: Any, room: int, until: float) -> None:
        write(self, unsent, 1, until)
        self._results |= {number: CONFIRMED for number, _ in self.in_flight.messages}
        self.in_flight._messages.clear()

    confirm_channel.ConfirmChannel.write = write_and_hope  # type: ignore[method-assign]


def deleted_before_it_is_sent() -> None:
    claim = OutboxStore.claim

    def claim_and_clear(
        self: OutboxStore, connection: DatabaseConnection, owner: str, *rest: Any
    ) -> Any:
        pending = claim(self, connection, owner, *rest)
        self.clear(connection, owner, [each.id for each in pending])
        connection.commit()
        return pending

    OutboxStore.claim = claim_and_clear  # type: ignore[method-assign]


def not_mandatory() -> None:
    learn = envelopes.Frames._learn

    def optional(self: envelopes.Frames, route: tuple[str, str, bool]) -> bytes:
        # The last octet of Basic.Publish holds the bits mandatory and immediate.
        frame = self._methods[route] = learn(self, route)[:-2] + b"\0" + envelopes.FRAME_END
        return frame

    envelopes.Frames._learn = optional  # type: ignore[method-assign]


def kombu_takes_from_redis() -> None:
    """What a worker has popped, and what it notes as unacknowledged, are two steps again.

    Its wait for a message lasts, so that the test finds it waiting; it ends every second else.
    """
    amqp.CapturingAMQP.Connection = Connection
    redis.Transport.brpop_timeout = 60


def early_acknowledgement() -> None:
    ReliableTask.acks_late = False
    safety.SAFE["acks_late"] = False


def no_reject_on_worker_lost() -> None:
    ReliableTask.reject_on_worker_lost = False
    safety.SAFE["reject_on_worker_lost"] = False


def annotations_stand() -> None:
    """What `task_annotations` say of a task holds in workers too."""
    safety.SAFE.clear()


def lost_workers_are_retried() -> None:
    """Celery itself sends the message of a lost worker again, as another message."""
    ReliableTask.retry_on_worker_lost = True
    safety.SAFE["retry_on_worker_lost"] = True


def refused_statements_fail_messages() -> None:
    """A server that takes no writes, or has no room, is not away: the message has failed."""
    for each in (PostgreSQL, MySQL):
        each.takes_no_writes = Dialect.takes_no_writes  # type: ignore[method-assign]
        each.is_outage = Dialect.is_outage  # type: ignore[method-assign]
    errors_of_ours_are_told_to_celery()


def errors_of_ours_are_told_to_celery() -> None:
    """Any error that ends a delivery is the handler's, and Celery acknowledges the message."""

    def tell(_: Any, error: BaseException) -> None:
        raise error

    task.requeue = tell  # type: ignore[assignment]
    task.guarded = lambda _, trace: trace


def retry_keeps_the_failed_attempt() -> None:
    run = handler.run

    def run_and_keep(*arguments: Any) -> handler.HandlerResult:
        try:
            return run(*arguments)
        except Retry:
            return handler.HandlerResult(ignored=Ignore())

    handler.run = run_and_keep


def links_published_by_celery_too() -> None:
    publish_next = handler.publish_next

    def publish_and_leave(task: Any, result: Any) -> None:
        callbacks, chain = task.request.callbacks, task.request.chain
        publish_next(task, result)
        task.request.callbacks, task.request.chain = callbacks, chain

    handler.publish_next = publish_and_leave


def retry_keeps_its_identity() -> None:
    identify = amqp.CapturingAMQP._identify

    def inherit(self: Any, headers: dict[str, Any]) -> Identity:
        return Identity.of_headers(headers) or identify(self, headers)

    amqp.CapturingAMQP._identify = inherit  # type: ignore[method-assign]


def chord_without_identity() -> None:
    chords.identify = lambda _: None


def dead_worker_keeps_its_claim_on_a_chord() -> None:
    chords.repeat_part = lambda _: None


def result_stands_for_the_whole_message() -> None:
    ReliableRequest._success_was_stored = Request._success_was_stored


def failure_is_told_once() -> None:
    recorded = handler.recorded
    handler.recorded = lambda task, result: (
        None if isinstance(result, Exception) else recorded(task, result)
    )


def no_order() -> None:
    Position.of_headers = lambda _: None  # type: ignore[method-assign,assign,return-value]


def celery_looks_first() -> None:
    """No message is inspected: Celery gets each as it comes."""
    Intake.__init__ = bootsteps.StartStopStep.__init__  # type: ignore[method-assign]
    Intake.start = Intake.stop = lambda *_: None  # type: ignore[method-assign,assign]


def acknowledged_before_it_is_kept() -> None:
    """The broker forgets a refused message before its dead letter is written."""
    keep = Intake._dead_letter

    def acknowledge_and_keep(self: Intake, message: Any, what: Any) -> None:
        if not message.acknowledged:
            message.ack()
        keep(self, message, what)

    Intake._dead_letter = acknowledge_and_keep  # type: ignore[method-assign]


def reply_sent_before_the_commit() -> None:
    """A reply goes straight to the broker, beside the transaction that does the work."""

    def publish(self: Responder, address: str, _: Any, correlation_id: str, *rest: Any) -> None:
        with self.service.app.connection_for_write() as connection:
            connection.Producer().publish(
                [[correlation_id, rest[-1]], {}, None],
                routing_key=address,
                headers={"task": REPLY_TASK, "id": correlation_id, "lang": "py"},
                serializer="json",
            )

    Responder._publish = publish  # type: ignore[method-assign]


def replies_need_no_queue() -> None:
    """A relay keeps trying to send a reply whose requester is gone."""
    settlement._may_be_dropped = lambda *_: False


def celery_drops_what_is_revoked() -> None:
    ReliableRequest.revoked = Request.revoked
    ReliableRequest._announce_revoked = Request._announce_revoked


def redeliveries_are_not_counted() -> None:
    Attempts.count = lambda *_: 0  # type: ignore[method-assign,assign,return-value]


def first_message_is_acknowledged_at_once() -> None:
    """The broker's delivery is over before the parked messages that follow it are handled."""
    acknowledge = ReliableRequest.acknowledge

    def acknowledge_and_go_on(self: ReliableRequest) -> None:
        successor, self.successor = self.successor, None
        if not isinstance(self.message, ParkedMessage):
            acknowledge(self)
        self.acknowledged = True
        if successor and self.local_delivery:
            self.local_delivery.deliver(self.message, successor)

    ReliableRequest.acknowledge = acknowledge_and_go_on  # type: ignore[method-assign]
    reject = ReliableRequest.reject

    def reject_what_is_open(self: ReliableRequest, requeue: bool = False) -> None:
        if not isinstance(self.message, ParkedMessage):
            reject(self, requeue)

    ReliableRequest.reject = reject_what_is_open


def copies_pass_on_nothing() -> None:
    TurnKeeper.pass_on_again = lambda *_: None  # type: ignore[method-assign,assign,return-value]


MUTATIONS: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        no_inbox,
        inbox_in_another_transaction,
        no_confirm,
        deleted_before_it_is_sent,
        not_mandatory,
        kombu_takes_from_redis,
        early_acknowledgement,
        no_reject_on_worker_lost,
        annotations_stand,
        lost_workers_are_retried,
        refused_statements_fail_messages,
        errors_of_ours_are_told_to_celery,
        retry_keeps_the_failed_attempt,
        links_published_by_celery_too,
        retry_keeps_its_identity,
        chord_without_identity,
        dead_worker_keeps_its_claim_on_a_chord,
        result_stands_for_the_whole_message,
        failure_is_told_once,
        no_order,
        celery_looks_first,
        acknowledged_before_it_is_kept,
        celery_drops_what_is_revoked,
        reply_sent_before_the_commit,
        replies_need_no_queue,
        redeliveries_are_not_counted,
        first_message_is_acknowledged_at_once,
        copies_pass_on_nothing,
    )
}
