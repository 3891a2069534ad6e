"""Delivery of parked messages to Celery by the worker itself, in its main process."""

from __future__ import annotations

from typing import Any

from celery.worker import state
from kombu import Message

from celery_eda.core import checkpoints, redaction
from celery_eda.core.message import Message as StoredMessage
from celery_eda.inbox.drain import Drain, Successor

log = redaction.logger(__name__)


class ParkedMessage(Message):
    """A parked message, made to look as if received from the broker by the delivery of another.

    That delivery is acknowledged, rejected or requeued when this message is.

    Attributes:
        drain: the parked messages that may follow this one.
    """

    def __init__(self, first: Message, successor: Successor) -> None:
        stored = successor.message
        super().__init__(
            stored.body,
            delivery_tag=first.delivery_tag,
            channel=first.channel,
            accept=first.accept,
            content_type=stored.content_type,
            content_encoding=stored.content_encoding,
            headers=dict(stored.headers),
            properties=dict(stored.properties),
            delivery_info=_delivery_info(stored, redelivered=successor.redelivered),
        )
        self.drain: Drain = successor.drain


class LocalDelivery:
    """Delivers parked messages to Celery while a worker is connected to its broker.

    Attributes:
        is_active: False once the connection is lost or the worker stops. The messages of its
            deliveries then come back.
    """

    def __init__(self, consumer: Any) -> None:
        self.is_active = True
        self._consumer = consumer
        self._handle = consumer.create_task_handler()
        pool = consumer.pool
        self._is_green = pool.is_green
        self._is_solo = type(pool).__module__.endswith(".solo")

    def deliver(self, first: Message, successor: Successor) -> bool:
        """Give *successor* to Celery as if received by the delivery of *first*.

        Returns:
            False if the worker stops or has lost that delivery.
        """
        if not self.is_active or _is_stopping():
            return False
        checkpoints.reach("drain.taken")
        message = ParkedMessage(first, successor)
        headers = message.headers
        log.info("%s[%s] was parked; its turn has come", headers["task"], headers["id"])
        self._pass_to_pool(message)
        return True

    def _pass_to_pool(self, message: ParkedMessage) -> None:
        if self._is_green:
            # A full pool has its caller wait; called at the end of a message, that is for itself.
            self._consumer.timer.call_after(0, self._handle, (message,))
        elif self._is_solo:
            # The pool runs a message before it returns; the next would run inside this one.
            self._consumer.call_soon(self._handle, message)
        else:
            self._handle(message)


def _is_stopping() -> bool:
    # An exit code, which may be 0.
    ends = (state.should_stop, state.should_terminate)
    return any(each is not None and each is not False for each in ends)


def _delivery_info(stored: StoredMessage, *, redelivered: bool) -> dict[str, Any]:
    return {
        "exchange": stored.exchange,
        "routing_key": stored.routing_key,
        "redelivered": redelivered,
    }
