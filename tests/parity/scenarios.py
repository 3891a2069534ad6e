"""Everything that can be asked of Celery's publishing; what each one publishes is compared.

A scenario is published in one go. Those in ``HANDLED`` are then received and handled as in a
worker, and what is published by that is compared, too.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

from celery import chain, chord, group, signature
from celery.canvas import StampingVisitor
from celery.signals import before_task_publish
from kombu import Exchange

from tests.parity.shop import STALL, Shop

Scenario = Callable[[Shop], Any]

#: The time it is in every scenario.
NOW = datetime(2033, 3, 3, 12, 30, 15, 250_000, timezone.utc)
LATER = NOW + timedelta(minutes=5)


class Counting(StampingVisitor):
    """Stamps each signature with a number of its own."""

    def __init__(self) -> None:
        self.count = 0

    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        self.count += 1
        return {"number": self.count, "stamped_headers": ["number"]}


def _stamped(sig: Any, **stamps: Any) -> Any:
    sig.stamp(None, **(stamps or {"stall": "south", "till": [1, 2]}))
    return sig


def _visited(sig: Any) -> Any:
    sig.stamp(Counting())
    return sig


def _with_connection(shop: Shop) -> None:
    with shop.app.connection_for_write() as connection:
        shop.add.apply_async((1, 2), connection=connection)


def _with_producer(shop: Shop) -> None:
    with shop.app.connection_for_write() as connection:
        producer = shop.app.amqp.Producer(connection, auto_declare=False)
        group(shop.add.s(1, 2), shop.add.s(3, 4)).apply_async(producer=producer)


def _with_signal(shop: Shop) -> None:
    def add_headers(headers: dict[str, Any], properties: dict[str, Any], **_: Any) -> None:
        headers["traceparent"] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        properties["app_id"] = "traced"

    before_task_publish.connect(add_headers)
    try:
        shop.add.delay(1, 2)
    finally:
        before_task_publish.disconnect(add_headers)


CALLED: dict[str, Scenario] = {
    "delay": lambda s: s.add.delay(1, 2),
    "keyword arguments": lambda s: s.add.apply_async(kwargs={"x": 1, "y": 2}),
    "arguments that JSON does not know": lambda s: s.note.delay(
        NOW, Decimal("1.10"), UUID(int=7), b"\x00\xff", when=LATER.date(), pair=(1, 2)
    ),
    "text in every script": lambda s: s.note.delay("ÄÖÜ ß 中文 🍫", größe="klein"),
    "a large body": lambda s: s.note.delay("chocolate " * 40_000),
    # ── when ──
    "countdown": lambda s: s.add.apply_async((1, 2), countdown=10),
    "countdown of a fraction": lambda s: s.add.apply_async((1, 2), countdown=1.5),
    "eta": lambda s: s.add.apply_async((1, 2), eta=LATER),
    "eta elsewhere": lambda s: s.add.apply_async(
        (1, 2), eta=LATER.astimezone(timezone(timedelta(hours=2))), queue="kitchen"
    ),
    "eta as text": lambda s: s.add.apply_async((1, 2), eta=LATER.isoformat()),
    "eta in the past": lambda s: s.add.apply_async((1, 2), eta=NOW - timedelta(1)),
    "expires in seconds": lambda s: s.add.apply_async((1, 2), expires=60),
    "expires at a time": lambda s: s.add.apply_async((1, 2), expires=LATER),
    "expires as text": lambda s: s.add.apply_async((1, 2), expires=LATER.isoformat()),
    "countdown and expires": lambda s: s.add.apply_async((1, 2), countdown=3, expires=60),
    # ── where ──
    "queue by name": lambda s: s.add.apply_async((1, 2), queue="kitchen"),
    "queue": lambda s: s.add.apply_async((1, 2), queue=s.app.amqp.queues["kitchen"]),
    "queue of a topic exchange": lambda s: s.add.apply_async((1, 2), queue="orders"),
    "queue that is not configured": lambda s: s.add.apply_async((1, 2), queue=STALL),
    "exchange and routing key": lambda s: s.add.apply_async(
        (1, 2), exchange="kitchen", routing_key="stove"
    ),
    "exchange": lambda s: s.add.apply_async(
        (1, 2), exchange=Exchange("kitchen", delivery_mode=1), routing_key="stove"
    ),
    "topic": lambda s: s.add.apply_async(
        (1, 2), exchange="events", routing_key="order.placed", exchange_type="topic"
    ),
    "fanout": lambda s: s.add.apply_async((1, 2), queue="all"),
    "broadcast": lambda s: s.refresh.apply_async(
        (1,), queue="everyone", declare=[s.app.amqp.queues["everyone"].exchange]
    ),
    "router": lambda s: s.routed.delay(1),
    # ── how ──
    "priority": lambda s: s.add.apply_async((1, 2), queue="ranked", priority=6),
    "highest priority": lambda s: s.add.apply_async((1, 2), queue="ranked", priority=9),
    "no priority": lambda s: s.add.apply_async((1, 2), queue="ranked", priority=None),
    "pickle": lambda s: s.note.apply_async(({1, 2, 3},), serializer="pickle"),
    "msgpack": lambda s: s.add.apply_async((1, 2), serializer="msgpack"),
    "yaml": lambda s: s.note.apply_async(({"a": [1, None]},), serializer="yaml"),
    "zlib": lambda s: s.note.apply_async(("sugar " * 999,), compression="zlib"),
    "bzip2": lambda s: s.note.apply_async(("sugar " * 999,), compression="bzip2"),
    "pickle and zlib": lambda s: s.note.apply_async(
        ("sugar " * 999,), serializer="pickle", compression="zlib"
    ),
    "headers": lambda s: s.add.apply_async(
        (1, 2),
        headers={
            "text": "Kakao ☕",
            "numbers": [1, -1, 2**40, 1.5],
            "flags": [True, False, None],
            "nested": {"list": [{"a": [1]}], "empty": {}},
        },
    ),
    "transient": lambda s: s.add.apply_async((1, 2), delivery_mode="transient"),
    "delivery mode": lambda s: s.add.apply_async((1, 2), delivery_mode=1),
    "shadow": lambda s: s.add.apply_async((1, 2), shadow="shop.other"),
    "time limits": lambda s: s.add.apply_async((1, 2), time_limit=9, soft_time_limit=8.5),
    "no result": lambda s: s.add.apply_async((1, 2), ignore_result=True),
    "reply and correlation": lambda s: s.add.apply_async(
        (1, 2), reply_to="my-replies", correlation_id="mine"
    ),
    "more properties": lambda s: s.add.apply_async(
        (1, 2), expiration=9.5, app_id="till", type="order", message_id="m-1", user_id="guest"
    ),
    "task id": lambda s: s.add.apply_async((1, 2), task_id="my-own"),
    "group, root and parent": lambda s: s.add.apply_async(
        (1, 2), group_id="g", group_index=3, root_id="r", parent_id="p"
    ),
    "no retry": lambda s: s.add.apply_async((1, 2), retry=False, timeout=3, confirm_timeout=4),
    "retry policy": lambda s: s.add.apply_async(
        (1, 2), retry=True, retry_policy={"max_retries": 3, "interval_start": 1}
    ),
    "not added to the parent": lambda s: s.add.apply_async((1, 2), add_to_parent=False),
    "own task class": lambda s: s.proud.delay(1),
    "options of the task": lambda s: s.quiet.delay(1),
    # ── by whom ──
    "connection": _with_connection,
    "producer": _with_producer,
    "by name": lambda s: s.app.send_task("shop.add", (1, 2)),
    "by the name of a task elsewhere": lambda s: s.app.send_task(
        "elsewhere.note", kwargs={"a": 1}, queue="kitchen", countdown=5
    ),
    "signature of a task elsewhere": lambda s: signature(
        "elsewhere.note", (1,), app=s.app, queue="kitchen", priority=4
    ).delay(),
    "partial signature": lambda s: s.add.s(1).apply_async((2,)),
    "immutable signature": lambda s: s.add.si(1, 2).apply_async((3,), countdown=1),
    "a signal that adds headers": _with_signal,
    # ── canvas ──
    "link": lambda s: s.add.apply_async((1, 2), link=s.add.s(3)),
    "links": lambda s: s.add.apply_async(
        (1, 2), link=[s.add.s(3), s.note.si(4), group(s.add.s(5), s.add.s(6))]
    ),
    "errback": lambda s: s.fail.apply_async(link_error=s.mourn_old.s()),
    "errbacks": lambda s: s.fail.apply_async(link_error=[s.mourn_old.s(), s.mourn_new.s()]),
    "chain": lambda s: (s.add.s(1, 2) | s.add.s(3) | s.add.s(4)).delay(),
    "chain with options": lambda s: chain(
        s.add.s(1, 2).set(queue="kitchen"), s.add.s(3).set(countdown=9, priority=5)
    ).apply_async(link=s.note.s(), link_error=s.mourn_old.s(), countdown=2),
    "group": lambda s: group(s.add.s(n, n) for n in range(4)).delay(),
    "group with options": lambda s: group(s.add.s(1), s.add.s(2)).apply_async(
        (7,), countdown=3, queue="kitchen", priority=2
    ),
    "chord": lambda s: chord([s.add.s(1, 1), s.add.s(2, 2)])(s.total.s()),
    "chord with options": lambda s: chord(
        [s.add.s(1, 1), s.add.s(2, 2)], s.total.s().set(queue="kitchen", priority=5)
    ).apply_async(countdown=4, link_error=s.mourn_old.s()),
    "chord of groups": lambda s: chord(
        [group(s.add.s(1, 1), s.add.s(2, 2)), group(s.add.s(3, 3), s.add.s(4, 4))]
    )(s.note.s()),
    "empty chord": lambda s: chord([])(s.total.s()),
    "chain of chords": lambda s: chain(
        group(s.add.s(1, 1), s.add.s(2, 2)), s.total.s(), group(s.add.s(3), s.add.s(4)), s.total.s()
    ).delay(),
    "group of chains": lambda s: group(
        s.add.s(1, 1) | s.add.s(2), s.add.s(3, 3) | s.add.s(4) | s.note.s()
    ).delay(),
    "chain in a chord in a chain": lambda s: chain(
        s.add.s(1, 1),
        chord([s.add.s(2) | s.add.s(3), s.add.s(4)], s.total.s() | s.add.s(5)),
        s.note.s(),
    ).delay(),
    "map": lambda s: s.total.map([[1, 2], [3]]).delay(),
    "starmap": lambda s: s.add.starmap([(1, 2), (3, 4)]).delay(),
    "chunks": lambda s: s.add.chunks(zip(range(6), range(6), strict=True), 2).delay(),
    "chunks as a group": lambda s: s.add.chunks([(1, 2), (3, 4), (5, 6)], 2).group().delay(),
    "stamps": lambda s: _stamped(s.add.s(1, 2), stall="north").delay(),
    "stamped canvas": lambda s: _stamped(
        chain(s.add.s(1, 2), group(s.add.s(3), s.add.s(4)), s.total.s())
    ).delay(),
    "stamping visitor": lambda s: _visited(
        group(s.add.s(1, 2), s.add.s(3, 4) | s.add.s(5))
    ).delay(),
}

HANDLED: dict[str, Scenario] = {
    name: CALLED[name]
    for name in (
        "delay",
        "link",
        "links",
        "errback",
        "errbacks",
        "chain",
        "chain with options",
        "stamped canvas",
        "chain in a chord in a chain",
        "starmap",
    )
} | {
    "published by a task": lambda s: s.busy.delay(),
    "published by a task with a priority": lambda s: s.busy.apply_async(queue="ranked", priority=4),
    "retry": lambda s: s.again.delay(1),
    "retry with everything": lambda s: s.again.apply_async(
        (1,),
        shadow="shop.once_more",
        link=s.note.s(),
        link_error=s.mourn_old.s(),
        expires=LATER,
        time_limit=9,
        headers={"stall": "north"},
        priority=2,
        reply_to="my-replies",
    ),
    "retry elsewhere": lambda s: s.insist.delay(1),
    "retry in a chain": lambda s: (s.again.s(1) | s.add.s(2)).delay(),
    "retry in a chord": lambda s: chord([s.again.s(1), s.add.s(2, 3)])(s.total.s()),
    "stamped retry": lambda s: _stamped(s.again.s(1), stall="north").delay(),
    "replaced": lambda s: s.swap.delay("task"),
    "replaced by a chain": lambda s: s.swap.delay("chain"),
    "replaced by a group": lambda s: s.swap.delay("group"),
    "replaced by a chord": lambda s: s.swap.delay("chord"),
    "replaced in a chain": lambda s: (s.swap.s("chain") | s.note.s()).delay(),
    "replaced, with links": lambda s: s.swap.apply_async(
        ("chord",), link=s.note.s(), link_error=s.mourn_old.s(), headers={"stall": "north"}
    ),
}
