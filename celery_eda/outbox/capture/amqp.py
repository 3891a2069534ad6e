"""From ``.delay()`` to the outbox: the one seam in Celery's publishing.

Every task message that Celery publishes passes through ``app.amqp.send_task_message``. Inside a
transaction Celery's own function gets a producer that records instead of sending, so the captured
message is exactly the one that Celery would have sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timedelta, timezone
from functools import cached_property, partial, wraps
from typing import Any

from celery import Celery
from celery.app.amqp import AMQP
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu import Connection, Queue
from kombu.common import Broadcast
from kombu.utils.imports import symbol_by_name

from celery_eda.brokers import SafeConnection, dead_letter_exchange, own_queues
from celery_eda.core import addresses, chord_identities, context
from celery_eda.core.addresses import REPLY_HEADER
from celery_eda.core.identity import HEADERS, Identity, Lane
from celery_eda.core.message import Message
from celery_eda.core.service import service_of
from celery_eda.core.silence import refuse_publishing_if_silenced
from celery_eda.errors import OtherBroker, UnsafeQueue
from celery_eda.ordering import keys
from celery_eda.outbox import result_backend
from celery_eda.outbox.capture.call_templates import CallTemplates
from celery_eda.outbox.capture.recorder import (
    LazyProducer,
    RecordingProducer,
    UndelayedPool,
    is_recording,
    recording,
)
from celery_eda.outbox.publisher import publishing
from celery_eda.outbox.wiring import Outbox

#: The longest delay of a message in the outbox; dates in databases end in the year 9999.
LONGEST_DELAY = timedelta(days=36500)
_NOTHING = nullcontext()


class CapturingAMQP(AMQP):
    """Celery's ``app.amqp`` that captures messages, with connections that lose none."""

    @cached_property
    def Connection(self) -> Callable[..., SafeConnection]:  # noqa: N802  # Celery's name for it
        """Makes connections to the broker; in a database, ``eda_*`` settings name its tables."""
        return partial(SafeConnection.made, service_of(self.app))

    @property
    def queues_cls(self) -> Any:
        """Celery's collection of queues, with ours, each with the limit ``eda_delivery_limit``."""
        service = service_of(self.app)
        base = own_queues.with_own_queues(super().queues_cls, service)
        if not (limit := service.settings.delivery_limit):
            return base
        return dead_letter_exchange.with_delivery_limit(base, limit, service.name)

    @property
    def producer_pool(self) -> Any:
        """Celery's own pool; while it makes a captured message, one that needs no broker."""
        pool = super().producer_pool
        return UndelayedPool(pool) if is_recording() else pool

    @property
    def make_task_sender(self) -> Callable[[], Callable[..., Any]]:
        """The method that makes Celery's own ``send_task_message``; an app may override it."""
        maker: Callable[[], Callable[..., Any]] = self._create_task_sender
        return maker

    @cached_property
    def send_task_message(self) -> Callable[..., Any]:
        send = self.make_task_sender()

        def send_task_message(
            producer: Any,
            name: str,
            message: Any,
            *,
            key: Any = None,
            eda_identity: Identity | None = None,
            **options: Any,
        ) -> Any:
            transaction = context.current_transaction()
            if transaction is None:
                refuse_publishing_if_silenced(name)
                _remove_identity(options)
                return send(producer, name, message, **options)
            self._refuse_other_broker(name, producer)
            replies = self._passes_reply_on(message)
            recorder = RecordingProducer()
            # Signal receivers publish as they would anywhere else.
            with recording(False):
                # The task-sent event reports a sending, which has not happened yet.
                send(recorder, name, message._replace(sent_event=None), **options)
            identity = eda_identity or self._identify(recorder.recorded["headers"])
            lane = self.lane_of(name, key, message.body)
            captured = self._captured(name, identity, lane, recorder)
            if progress := context.in_progress.get():
                progress.observe(captured, replies=replies)
            transaction.capture(captured)
            return None

        return send_task_message

    def _retry_publish(self, publish: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Publish a link, the next task of a chain or the body of a chord, as Celery does."""
        with context.apart_from_sessions(self.app.current_task):
            return super()._retry_publish(publish, *args, **kwargs)

    def _refuse_other_broker(self, task: str, producer: Any) -> None:
        """Check that a call of *task* names no other broker than the app's.

        Raises:
            OtherBroker: the caller gave a connection or a producer to another one.
        """
        if producer is None or isinstance(producer, LazyProducer | RecordingProducer):
            return
        given = producer.connection
        if not _nodes(given) <= _nodes(self.app.connection_for_write()):
            raise OtherBroker(
                f"{task} is called with a connection or producer to {given.as_uri()}, which is not "
                "the broker of the app. A message that is stored in the outbox goes to the broker "
                "of the app. Call it without a connection or producer, or publish it with "
                "`send_task` of a Celery app of that broker, which sends it at once."
            )

    def _passes_reply_on(self, message: Any) -> bool:
        """Write the reply address into *message* if it replaces the one in progress.

        Returns:
            True if its handling will send the reply.
        """
        progress = context.in_progress.get()
        if progress is None or progress.finished:
            return False
        delivery = progress.delivery
        return delivery.reply_to is not None and addresses.write_to_successor(
            delivery.reply_to, delivery.task_id, message
        )

    def lane_of(self, task: str, key: Any, body: Any) -> Lane | None:
        """The lane of a message; the caller names its key, or else the task computes it."""
        if key is None:
            key_of = getattr(self.app.tasks.get(task), "ordering_key", None)
            key = key_of and key_of(*body[0], **body[1])
        return None if key is None else keys.ordering_key(service_of(self.app).name, task, key)

    def _captured(
        self, task: str, identity: Identity, lane: Lane | None, recorder: RecordingProducer
    ) -> Message:
        recorded = recorder.recorded
        headers = recorded.pop("headers")
        reliable = REPLY_HEADER in headers or service_of(self.app).is_reliable(task)
        if reliable:
            self._refuse_unsafe_queue(task, recorded["exchange"], recorded["routing_key"])
        if headers.get("expires") and reliable:
            # The broker would drop it silently. A worker that receives it makes it a dead letter.
            recorded["properties"].pop("expiration", None)
        declared = [each for each in recorder.declare if isinstance(each, Queue)]
        unknown = [each for each in declared if self.queues.get(each.name) != each]
        message = Message(
            identity=identity,
            task=task,
            # A retry inherits the headers of the message it repeats. Ours are always new.
            headers={**_without_ours(headers), **identity.headers},
            due=self._due(headers.get("eta")),
            queue=self._queue_of(declared, recorded["exchange"]),
            prerequisites=(
                *result_backend.take_prerequisites(),
                *map(result_backend.declaration_of, unknown),
            ),
            lane=lane,
            **recorded,
        )
        progress = context.in_progress.get()
        if progress and identity == progress.delivery.identity.next:
            return message.at(progress.delivery.position)
        refuse_publishing_if_silenced(task)
        return message

    def _refuse_unsafe_queue(self, task: str, exchange: str, routing_key: str) -> None:
        """Check that a call of the reliable *task* goes to no queue in which it would be lost.

        Raises:
            UnsafeQueue: the queue has ``no_ack``, or each worker has its own copy of it.
        """
        for queue in self.queues.values():
            name = queue.exchange.name
            if isinstance(queue, Broadcast) and exchange == name:
                raise UnsafeQueue(
                    f"{task} is reliable, and routed to the broadcast {name!r}: of the copies, one "
                    "for each worker, only the first would take effect. Make it a plain task, or "
                    "emit an event for eda.on(…, every_worker=True)."
                )
            if queue.no_ack and (exchange, routing_key) in (
                ("", queue.name),
                (name, queue.routing_key),
            ):
                raise UnsafeQueue(
                    f"{task} is reliable, and routed to {queue.name!r}, a queue with no_ack: the "
                    "broker forgets each message that it delivers, so that a worker which dies "
                    "would lose it. Route it to a queue without no_ack."
                )

    def _queue_of(self, declared: Sequence[Queue], exchange: str) -> str | None:
        """The configured queue to declare before sending.

        With an exchange given by name, Celery declares the default queue, which will not get the
        message. Any queue on that exchange is declared instead, which makes the exchange too.
        """
        for queue in declared:
            if exchange in ("", queue.exchange.name):
                return queue.name if self.queues.get(queue.name) == queue else None
        beside = (each.name for each in self.queues.values() if each.exchange.name == exchange)
        return next(beside, None) if exchange else None

    def _identify(self, headers: dict[str, Any]) -> Identity:
        """The identity of a message to which its publisher gave none."""
        if identity := chord_identities.next_identity():
            return identity
        progress = context.in_progress.get()
        task = self.app.current_worker_task
        if (
            progress is not None
            and task is not None
            and (task.request.id == headers.get("id") == progress.delivery.task_id)
            and headers.get("retries") == progress.delivery.retries + 1
        ):
            return progress.delivery.identity.next
        return Identity.fresh()

    def _due(self, eta: Any) -> datetime | None:
        if not eta:
            return None
        due: datetime = maybe_make_aware(maybe_iso8601(eta), self.app.timezone)
        return min(due, datetime.now(timezone.utc) + LONGEST_DELAY)


def _refuse_other_app(task: str, app: Celery, other: Celery) -> None:
    """Check that the transaction of the app *other* can have a message of *app*.

    Raises:
        OtherBroker: the apps have different brokers; the message would go to the wrong one.
    """
    if _nodes(app.connection_for_write()) != _nodes(other.connection_for_write()):
        raise OtherBroker(
            f"{task} of the app {app.main!r} is called in a transaction of the app "
            f"{other.main!r}, whose messages go to another broker. Call it in a transaction of its "
            "own app, or inside `with eda.outside():`, which does not wait for the commit."
        )


def _nodes(connection: Connection) -> set[tuple[Any, ...]]:
    """The places that *connection* leads to: several, if it names more than one node."""
    each = [Connection(url).info() for url in connection.alt] or [connection.info()]
    names = ("transport", "hostname", "port", "virtual_host", "userid")
    return {tuple(info[name] for name in names) for info in each}


def _remove_identity(options: dict[str, Any]) -> None:
    """Remove our identity from the headers that a plain retry inherits from its message."""
    if headers := options.get("headers"):
        options["headers"] = _without_ours(headers)


def _without_ours(headers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in headers.items() if name not in HEADERS}


def wrap_send_task(app: Celery, outbox: Outbox) -> None:
    """Route every ``send_task`` of *app* through the publisher.

    Inside a transaction the call is captured; outside one, ``eda_outside`` decides.
    """
    send_task = app.send_task
    templates = CallTemplates(app, outbox, send_task)

    @wraps(send_task)
    def send_task_or_capture(
        name: str, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any
    ) -> Any:
        with _continuing(app, options), publishing(outbox, name, options.get("key")):
            transaction = context.current_transaction()
            if transaction and transaction.service not in (None, outbox.service):
                _refuse_other_app(name, app, transaction.service.app)
            if transaction is None:
                return send_task(name, args, kwargs, *rest, **options)
            with recording(True):
                if rest:
                    return send_task(name, args, kwargs, *rest, **options)
                return templates.send(transaction, name, args, kwargs, options)

    app.send_task = send_task_or_capture
    _acquire_late(app)


def _continuing(app: Celery, options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """A block that publishes a call; apart from sessions if the call continues the running task.

    Both a retry and a replacement end their task by an exception, which may roll sessions back.
    """
    if not options.get("retries") and not options.get("replaced_task_nesting"):
        return _NOTHING
    if (task := app.current_worker_task) is None:
        return _NOTHING
    request = task.request
    retries, nesting = options.get("retries") or 0, options.get("replaced_task_nesting") or 0
    if (
        options.get("task_id") == request.id and retries == request.retries + 1
    ) or nesting > request.replaced_task_nesting:
        return context.apart_from_sessions(task)
    return _NOTHING


def _acquire_late(app: Celery) -> None:
    """Inside a transaction, let ``app.producer_or_acquire`` take a producer on its first use.

    A group acquires one for its calls, which need none.
    """
    acquire = app._acquire_producer

    def acquire_producer(timeout: float | None = None) -> Any:
        if context.current_transaction() is None:
            return acquire(timeout=timeout)
        return LazyProducer(partial(acquire, timeout=timeout))

    app._acquire_producer = acquire_producer


def amqp_class(base: Any) -> type[CapturingAMQP]:
    """A capturing subclass of *base*, which is a class or its import path."""
    base = symbol_by_name(base)
    if base is AMQP:
        return CapturingAMQP
    return type(base.__name__, (CapturingAMQP, base), {})
