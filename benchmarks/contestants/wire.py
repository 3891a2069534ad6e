"""The limit: prebuilt messages, written to the broker at full speed, without a database.

To RabbitMQ as AMQP frames with confirms and a window of unconfirmed messages; to Redis with one
LPUSH for many messages. For comparison, the same message published by kombu.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import count as count_from
from typing import Any
from uuid import uuid4

from celery import Celery
from kombu import Connection, Queue
from redis import Redis

from benchmarks.contestants.serving import PAYLOAD, environment, serve
from celery_eda.brokers.rabbitmq.envelopes import Frames
from celery_eda.core.identity import Identity
from celery_eda.core.message import Message
from celery_eda.outbox.capture.recorder import RecordingProducer

WINDOW = 500
#: Messages per LPUSH, or per write to the socket.
AT_ONCE = 500
#: Seconds to wait for outstanding confirms.
PATIENCE = 30.0

QUEUE = environment("QUEUE") or "relayed"
QUEUE_TYPE = environment("QUEUE_TYPE") or "classic"


@cache
def message() -> Message:
    """A Celery message of about 1 KB."""
    app = Celery("wire", set_as_current=False)
    recorder = RecordingProducer()
    task = app.amqp.as_task_v2(str(uuid4()), "bench.carry", (PAYLOAD,))
    app.amqp.send_task_message(recorder, "bench.carry", task, queue=Queue(QUEUE))
    recorded = {**recorder.recorded, "exchange": "", "routing_key": QUEUE}
    return Message(Identity.fresh(), "bench.carry", **recorded)


@cache
def broker() -> Any:
    return Connection(environment("BROKER"), heartbeat=0)


def declare(*names: str) -> None:
    """Declare queues, by default the common one, with the same arguments as Celery."""
    for name in names or (QUEUE,):
        queue = Queue(name, queue_arguments={"x-queue-type": QUEUE_TYPE}, routing_key=name)
        with broker().channel() as channel:
            queue.bind(channel).declare()


def empty(queue: str = QUEUE) -> int:
    """Purge the queue; returns the number of messages."""
    with broker().channel() as channel:
        return int(channel.queue_purge(queue))


# ── RabbitMQ ────────────────────────────────────────────────────────────────────────────────────


@cache
def _confirming() -> tuple[Any, Any, bytes]:
    """A connection, a channel in confirm mode, and the AMQP frames of one message."""
    connection = broker().connection
    channel = connection.channel()
    channel.confirm_select()
    frames = Frames(channel.channel_id, connection.frame_max)
    frames.add(message())
    return connection, channel, bytes(frames.take())


def write_confirmed(count: int) -> int:
    """Write the frames of *count* messages with a window; returns the number of confirms.

    Raises:
        TimeoutError: a confirm is missing.
    """
    connection, channel, frame = _confirming()
    half = WINDOW // 2
    batch, sent = frame * half, 0
    waiting: dict[int, None] = {}

    def confirm(tag: int, multiple: bool) -> None:
        if not multiple:
            del waiting[tag]
            return
        while waiting and (oldest := next(iter(waiting))) <= tag:
            del waiting[oldest]

    channel.events["basic_ack"].clear()
    channel.events["basic_ack"].add(confirm)
    while sent < count or waiting:
        if sent < count and len(waiting) <= half:
            many = min(half, count - sent)
            waiting.update(dict.fromkeys(next(_tags) for _ in range(many)))
            connection.transport.write(memoryview(batch if many == half else frame * many))
            sent += many
        else:
            connection.drain_events(timeout=PATIENCE)
    return sent


def send_tasks(task: str, queue: str, count: int) -> int:
    """Write calls of *task* with the numbers from 0 to *count*, built before the first is sent."""
    connection, channel, _ = _confirming()
    frames = Frames(channel.channel_id, connection.frame_max)
    for number in range(count):
        next(_tags)
        frames.add(_call(task, queue, number))
    connection.transport.write(frames.take())
    return count


def _call(task: str, queue: str, number: int) -> Message:
    """A call of *task* with an identity of its own, which plain Celery ignores."""
    identity, task_id = Identity.fresh(), str(uuid4())
    body = json.dumps([[number], {}, {"callbacks": None, "errbacks": None, "chain": None}])
    template = message()
    return replace(
        template,
        body=body.encode(),
        headers={
            **template.headers,
            "task": task,
            "id": task_id,
            "root_id": task_id,
            "argsrepr": f"({number},)",
            **identity.headers,
        },
        properties={**template.properties, "correlation_id": task_id},
        routing_key=queue,
    )


#: Delivery tags of one channel continue from run to run.
_tags = count_from(1)


# ── Redis ───────────────────────────────────────────────────────────────────────────────────────


@cache
def _redis() -> tuple[Any, bytes]:
    """A client, and one message as kombu stores it in a list."""
    client = Redis.from_url(environment("BROKER"))
    publish_with_kombu(1)
    payload = client.rpop(QUEUE)
    assert isinstance(payload, bytes), "kombu has put it elsewhere"
    return client, payload


def push(count: int) -> int:
    """Push *count* messages, many per command."""
    client, payload = _redis()
    for start in range(0, count, AT_ONCE):
        client.lpush(QUEUE, *[payload] * min(AT_ONCE, count - start))
    return count


@cache
def _producer() -> Any:
    return broker().Producer()


def publish_with_kombu(count: int) -> int:
    """Publish *count* messages with kombu."""
    one = message()
    for _ in range(count):
        _producer().publish(
            one.body,
            exchange=one.exchange,
            routing_key=one.routing_key,
            headers=dict(one.headers),
            content_type=one.content_type,
            content_encoding=one.content_encoding,
            **one.properties,
        )
    return count


VERBS: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        declare,
        empty,
        write_confirmed,
        send_tasks,
        push,
        publish_with_kombu,
    )
}

if __name__ == "__main__":
    serve(VERBS)
