"""From ``.delay()`` to the outbox: the one seam in Celery's publishing.

Whatever Celery publishes as a task message, whoever publishes it, comes through
``app.amqp.send_task_message``. Inside a transaction Celery's own function is given a producer
that records instead of sending, so the message is exactly what Celery would have sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cached_property, partial, wraps
from typing import Any

from celery import Celery
from celery.app.amqp import AMQP
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu import Queue
from kombu.utils.imports import symbol_by_name

from celery_eda import addresses, context, ordering, results
from celery_eda.addresses import REPLY_HEADER
from celery_eda.errors import OutsideTransaction
from celery_eda.identity import HEADERS, Identity, Lane
from celery_eda.message import Message
from celery_eda.prepared import Prepared
from celery_eda.recording import RecordingPool, RecordingProducer
from celery_eda.transports import SafeConnection, undelivered

_NOTHING = nullcontext()
#: Longest delay that the outbox keeps; databases end in the year 9999.
LONGEST_DELAY = timedelta(days=36500)


@dataclass(frozen=True)
class Publisher:
    """Decides where a message published right now goes.

    Attributes:
        outside: the setting ``eda_outside``.
        is_reliable: whether the task of this name is handled exactly once.
        store: writes messages to the outbox in a short transaction of its own.
    """

    outside: str | None
    is_reliable: Callable[[str], bool]
    store: Callable[[Sequence[Message]], None]

    def apart(self, task: str) -> AbstractContextManager[None]:
        """Inside any transaction: nothing. Outside: store what the block publishes, if so set.

        Raises:
            OutsideTransaction: the settings forbid it.
        """
        if self.outside == "send" or context.current_transaction() is not None:
            return _NOTHING
        if self.outside is None and not self.is_reliable(task):
            return _NOTHING
        return self.stored(task, self.store)

    @contextmanager
    def stored(self, what: str, store: Callable[[Sequence[Message]], None]) -> Iterator[None]:
        """Inside any transaction: nothing. Outside: let *store* have what the block publishes.

        Raises:
            OutsideTransaction: the settings forbid it.
        """
        if context.current_transaction() is not None:
            yield
            return
        if self.outside == "raise":
            raise OutsideTransaction(
                f"{what} was published outside any transaction and eda_outside is 'raise'. "
                "Publish it inside `with eda.transaction():`, attach the sessionmaker in use, "
                "or choose eda_outside = 'store' or 'send'."
            )
        collected = context.Collected()
        with context.scope_of(collected):
            yield
        if collected.messages:
            store(collected.messages)


class CapturingAMQP(AMQP):
    """Celery's ``app.amqp``, with the seam, and with connections that lose nothing."""

    @cached_property
    def Connection(self) -> Callable[..., SafeConnection]:  # noqa: N802  # Celery's name for it
        """Connects; to a database that is the broker with the tables that the settings name."""
        return partial(SafeConnection.made, lambda: self.app.eda.tables)

    @property
    def queues_cls(self) -> Any:
        """Celery's collection of queues; the queues in it have the limit that the settings say."""
        base, eda = super().queues_cls, self.app.eda
        if not (limit := eda.settings.delivery_limit):
            return base
        return undelivered.with_delivery_limit(base, limit, eda.service)

    @property
    def producer_pool(self) -> Any:
        """Inside a transaction a pool that needs no broker, else Celery's own."""
        return RecordingPool() if context.current_transaction() else super().producer_pool

    @cached_property
    def send_task_message(self) -> Callable[..., Any]:
        send = self._create_task_sender()

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
                context.refuse_publishing_if_silenced(name)
                _forget_identity(options)
                return send(producer, name, message, **options)
            replies = self._passes_reply_on(message)
            recorder = RecordingProducer()
            # The task-sent event is about a sending that has not happened.
            send(recorder, name, message._replace(sent_event=None), **options)
            identity = eda_identity or self._identify(recorder.recorded["headers"])
            lane = self.lane_of(name, key, message.body)
            captured = self._captured(name, identity, lane, recorder)
            if progress := context.in_progress.get():
                progress.observe(captured, replies=replies)
            transaction.capture(captured)
            return None

        return send_task_message

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
        """The lane of a message: its key is said by the caller, else by the task."""
        if key is None:
            key_of = getattr(self.app.tasks.get(task), "ordering_key", None)
            key = key_of and key_of(*body[0], **body[1])
        return None if key is None else ordering.lane(self.app.eda.service, task, key)

    def _captured(
        self, task: str, identity: Identity, lane: Lane | None, recorder: RecordingProducer
    ) -> Message:
        recorded = recorder.recorded
        headers = recorded.pop("headers")
        reliable = REPLY_HEADER in headers or self.app.eda.is_reliable(task)
        if headers.get("expires") and reliable:
            # The broker would drop it unseen; the worker that gets it makes a dead letter of it.
            recorded["properties"].pop("expiration", None)
        declared = [each for each in recorder.declare if isinstance(each, Queue)]
        unknown = [each for each in declared if self.queues.get(each.name) != each]
        message = Message(
            identity=identity,
            task=task,
            # A retry inherits the headers of the message it repeats: those of ours are always anew.
            headers={**_without_ours(headers), **identity.headers},
            due=self._due(headers.get("eta")),
            queue=self._queue_of(declared, recorded["exchange"]),
            preparation=(*results.take_preparation(), *map(results.declaration_of, unknown)),
            lane=lane,
            **recorded,
        )
        progress = context.in_progress.get()
        if progress and identity == progress.delivery.identity.next:
            return message.at(progress.delivery.position)
        context.refuse_publishing_if_silenced(task)
        return message

    def _queue_of(self, declared: Sequence[Queue], exchange: str) -> str | None:
        """The configured queue to declare before sending.

        With an exchange given by name, Celery declares the default queue, which will not get the
        message: any queue on that exchange makes the exchange known instead.
        """
        for queue in declared:
            if exchange in ("", queue.exchange.name):
                return queue.name if self.queues.get(queue.name) == queue else None
        beside = (each.name for each in self.queues.values() if each.exchange.name == exchange)
        return next(beside, None) if exchange else None

    def _identify(self, headers: dict[str, Any]) -> Identity:
        """The identity of a message to which its publisher gave none."""
        if identity := context.next_identity():
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


def _forget_identity(options: dict[str, Any]) -> None:
    """A plain retry inherits the headers of the message it repeats, our identity among them."""
    if headers := options.get("headers"):
        options["headers"] = _without_ours(headers)


def _without_ours(headers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in headers.items() if name not in HEADERS}


def store_outside(app: Celery) -> None:
    """Let *app* do with what is published outside any transaction what its settings say."""
    send_task = app.send_task
    prepared = Prepared(app, send_task)

    @wraps(send_task)
    def send_task_apart(
        name: str, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any
    ) -> Any:
        with app.eda.publisher.apart(name):
            transaction = context.current_transaction()
            if transaction is None or rest:
                return send_task(name, args, kwargs, *rest, **options)
            return prepared.send(transaction, name, args, kwargs, options)

    app.send_task = send_task_apart


def amqp_class(base: Any) -> type[CapturingAMQP]:
    """*base*, a class or its import path, with the seam."""
    base = symbol_by_name(base)
    if base is AMQP:
        return CapturingAMQP
    return type(base.__name__, (CapturingAMQP, base), {})
