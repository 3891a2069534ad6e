"""What Celery would send, kept instead of sent: a producer without a connection.

It does what ``kombu.Producer.publish`` does up to the channel, with kombu's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from celery import Task
from celery.utils.time import maybe_iso8601
from kombu import Producer, Queue
from kombu.exceptions import EncodeError
from kombu.serialization import registry

from celery_eda.message import Identity, Message


class _Unconnected:
    """Stands where Celery expects a broker connection, and connects to nothing.

    Its driver is none of those for which Celery routes a delay through the broker: the outbox
    keeps delays itself.
    """

    transport = type("transport", (), {"driver_type": "outbox"})
    default_channel = None
    recoverable_connection_errors = ()

    def _reraise_as_library_errors(self) -> nullcontext[None]:
        return nullcontext()


class RecordingProducer:
    """Stands where Celery expects a producer, and keeps the message instead of sending it."""

    connection = _Unconnected()
    channel = None

    def __init__(self) -> None:
        self.recorded: dict[str, Any] = {}
        self.declare: Sequence[Any] = ()

    def publish(
        self,
        body: Any,
        routing_key: str | None = None,
        exchange: Any = None,
        headers: dict[str, Any] | None = None,
        serializer: str | None = None,
        compression: str | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        delivery_mode: Any = None,
        declare: Sequence[Any] | None = None,
        retry: Any = None,
        retry_policy: Any = None,
        timeout: Any = None,
        confirm_timeout: Any = None,
        **properties: Any,
    ) -> None:
        """Serialize and keep what :meth:`kombu.Producer.publish` would send."""
        kombu = Producer(None)
        headers = {} if headers is None else headers
        name, properties["delivery_mode"] = kombu._delivery_details(
            exchange or kombu.exchange, delivery_mode
        )
        body, content_type, content_encoding = kombu._prepare(
            body, serializer, content_type, content_encoding, compression, headers
        )
        if isinstance(reply_to := properties.get("reply_to"), Queue):
            properties["reply_to"] = reply_to.name
        self.declare = declare or ()
        self.recorded = {
            "body": body.encode() if isinstance(body, str) else body,
            "content_type": content_type,
            "content_encoding": content_encoding,
            "headers": headers,
            "exchange": name,
            "routing_key": routing_key or "",
            # Those that are None, too: without a priority kombu would write 0.
            "properties": properties,
        }

    def revive(self, channel: Any) -> None:
        """Nothing is connected, so there is nothing to revive."""

    def release(self) -> None:
        """Nothing was acquired."""

    def __enter__(self) -> RecordingProducer:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing was acquired."""


class RecordingPool:
    """Stands where Celery expects a producer pool; it never runs empty."""

    connections = type("connections", (), {"connection": _Unconnected()})

    def acquire(self, block: bool = False, timeout: float | None = None) -> RecordingProducer:
        return RecordingProducer()


def message_in_progress(task: Task, identity: Identity) -> Message:
    """The message that *task* handles right now, rebuilt from Celery's request."""
    request = task.request
    options = request.as_execution_options()
    info = request.delivery_info or {}
    headers, properties, body, _ = task.app.amqp.as_task_v2(
        options["task_id"],
        task.name,
        request.args,
        request.kwargs,
        eta=maybe_iso8601(request.eta),
        group_id=options["group_id"],
        group_index=options["group_index"],
        expires=maybe_iso8601(options["expires"]),
        retries=options["retries"],
        chord=options["chord"],
        callbacks=options["link"],
        errbacks=options["link_error"],
        reply_to=options["reply_to"],
        time_limit=options["time_limit"],
        soft_time_limit=options["soft_time_limit"],
        root_id=options["root_id"],
        parent_id=options["parent_id"],
        shadow=options["shadow"],
        chain=options["chain"],
        ignore_result=request.ignore_result,
        replaced_task_nesting=options["replaced_task_nesting"],
        origin=options["origin"],
    )
    recorder = RecordingProducer()
    recorder.publish(
        body,
        routing_key=info.get("routing_key"),
        exchange=info.get("exchange"),
        headers={**headers, **(options["headers"] or {}), **identity.headers},
        serializer=_serializer(task, body),
        priority=info.get("priority"),
        **properties,
    )
    return Message(identity=identity, task=task.name, **recorder.recorded)


def _serializer(task: Task, body: Any) -> Any:
    """The task's serializer; if that cannot write *body*, the one that its publisher chose.

    Raises:
        EncodeError: none can.
    """
    accepted = (registry.type_to_name.get(each, each) for each in task.app.conf.accept_content)
    for name in (task.serializer, *accepted):
        try:
            registry.dumps(body, name)
        except EncodeError as error:
            failure = error
        else:
            return name
    raise failure
