"""What only a real broker and a real worker show of a delivery; the rest is in ``unit``."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from kombu import Connection, Message
from kombu.simple import SimpleQueue

from tests.faults.conftest import PATIENCE, Road

pytestmark = pytest.mark.parametrize(
    "road", ["rabbitmq-postgresql", "redis-mariadb"], indirect=True
)


@pytest.fixture
def plain(road: Road) -> Iterator[Celery]:
    """A publisher that knows nothing of this system, and waits for results."""
    results = f"db+{road.database}"
    road.environment["ROAD_RESULTS"] = results
    app = Celery(broker=road.broker, backend=results)
    app.conf.update(task_default_queue="road", broker_transport_options=road_options(road))
    yield app
    app.close()


def road_options(road: Road) -> dict[str, Any]:
    return {"visibility_timeout": 3600} if road.broker.startswith("redis") else {}


@contextmanager
def queue(road: Road) -> Iterator[SimpleQueue]:
    """The queue of the road, to take messages from and put them there as they are."""
    with Connection(road.broker, transport_options=road_options(road)) as connection:
        yield connection.SimpleQueue("road")


def put(queue: SimpleQueue, message: Message, **headers: Any) -> None:
    """Put *message* on the wire once more, byte for byte, but for *headers*."""
    queue.producer.publish(
        message.body,
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        headers={**message.headers, **headers},
        correlation_id=message.properties.get("correlation_id"),
        exchange=queue.queue.exchange,
        routing_key=queue.queue.routing_key,
    )


def captured(road: Road, code: str) -> Message:
    """The message that *code* publishes, as it comes out of the broker."""
    road.run(code + "\neda.outbox.relay().drain()")
    with queue(road) as waiting:
        message = waiting.get(timeout=PATIENCE)
        message.ack()
        return message


def test_copies_take_effect_once_and_give_the_recorded_result(road: Road, plain: Celery) -> None:
    message = captured(road, "print(add.delay(1, 2))")
    result = plain.AsyncResult(message.headers["id"])
    with queue(road) as wire:
        for _ in range(4):
            put(wire, message)
    road.worker()
    road.worker("-n", "another@%h")

    assert result.get(timeout=PATIENCE) == 3
    result.forget()
    with queue(road) as wire:
        put(wire, message)
    road.until(result.ready, "the result once more")
    road.settle()

    assert result.result == 3
    assert road.effects("add") == Counter([1])


def test_messages_of_a_publisher_without_identities_take_effect_once(
    road: Road, plain: Celery
) -> None:
    for task_id in ("a", "a", "b", "a"):
        plain.send_task("road.charge", (ord(task_id),), task_id=task_id)
    plain.send_task("road.flaky", (7,), task_id="c")
    plain.send_task("road.flaky", (7,), task_id="c")
    road.worker()
    road.relay()

    road.until(lambda: len(road.effects()) >= 3, "all charges")
    road.settle(3.0)

    assert road.effects() == Counter([ord("a"), ord("b"), 7])
    assert road.effects("flaky") == Counter([7])


def test_what_cannot_be_handled_is_kept_and_its_neighbours_go_on(road: Road, plain: Celery) -> None:
    message = captured(road, "charge.delay(1)")
    worker = road.worker()
    road.relay()
    with queue(road) as wire:
        put(wire, message, id=str(uuid4()), eda_id="no id")
        put(wire, message, id=str(uuid4()), eda_revision=-1)
        put(wire, message)
    road.run("refuse.delay(2, for_good=True)\nfail.delay(3)\ncharge.delay(4)")

    road.until(lambda: len(road.dead()) >= 4, "dead letters")
    road.until(lambda: len(road.effects()) >= 2, "the neighbours")
    road.settle(3.0)

    assert sorted(road.dead()) == [
        ("road.charge", "malformed"),
        ("road.charge", "malformed"),
        ("road.fail", "failed"),
        ("road.refuse", "rejected"),
    ]
    assert road.effects() == Counter([1, 4])
    assert road.effects("refuse") == road.effects("fail") == Counter()
    assert worker.alive


def test_a_policy_counts_the_attempts_of_a_message_across_workers_and_copies(
    road: Road, plain: Celery
) -> None:
    hopeless = captured(road, "unsteady.delay(7, 99)")
    patient = captured(road, "unsteady.delay(8, 3)")
    with queue(road) as wire:
        for message in (hopeless, patient) * 3:
            put(wire, message)
    road.worker()
    road.worker("-n", "another@%h")
    road.relay()

    assert plain.AsyncResult(patient.headers["id"]).get(timeout=PATIENCE) == 8
    road.until(road.dead, "the dead letter")
    road.settle(3.0)

    assert road.dead() == [("road.unsteady", "retries exhausted")]
    assert road.effects("unsteady") == road.effects() == Counter([8])
    assert road.ends(hopeless.headers["eda_id"]) == ["retried", "retried", "retried", "dead"]
    assert road.ends(patient.headers["eda_id"]) == ["retried", "retried", "retried", "done"]
    # As with Celery's own retries: a worker may tell of an attempt after another one of the end.
    assert plain.AsyncResult(hopeless.headers["id"]).state in ("FAILURE", "RETRY")


def test_a_delayed_message_waits_in_the_outbox_and_nowhere_else(road: Road, plain: Celery) -> None:
    worker = road.worker()
    road.relay()
    road.place(1, 1)
    road.until(lambda: road.effects() == Counter([1]), "a worker that works")
    began = time.monotonic()
    road.run("charge.apply_async((2,), countdown=20)")

    assert road.waiting() == 1
    inspected = plain.control.inspect(timeout=30.0, limit=1)
    in_memory = [inspected.scheduled(), inspected.reserved()]
    with queue(road) as waiting, pytest.raises(waiting.Empty):
        waiting.get(timeout=0.5)
    assert all(list(each.values()) == [[]] for each in in_memory), json.dumps(in_memory)
    road.until(lambda: len(road.effects()) == 2, "the due message")
    assert time.monotonic() - began >= 20
    assert worker.alive
