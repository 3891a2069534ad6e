"""What becomes of replies on RabbitMQ that were under way when a connection broke."""

from __future__ import annotations

import json
import time
from typing import Any

from celery import Celery
from kombu import Connection

from celery_eda.brokers.rabbitmq.replies import ReplyConsumer
from celery_eda.core import addresses
from tests.support.waiting import BOUND

NAME = addresses.of_process()


def replies(url: str) -> ReplyConsumer:
    return ReplyConsumer(Celery(broker=url, set_as_current=False), expires=60.0)


def put(url: str, numbers: range) -> None:
    with Connection(url) as connection:
        for number in numbers:
            connection.Producer().publish(json.dumps(number), routing_key=NAME)


def taken(waiting: ReplyConsumer, count: int, within: float = BOUND) -> list[Any]:
    """Collect replies until there are *count*, or until the time is over."""
    found: list[Any] = []
    until = time.monotonic() + within
    while len(found) < count and time.monotonic() < until:
        found += [json.loads(each.body) for each in waiting.take(0.5)]
    return found


def test_what_was_on_its_way_when_the_connection_broke_comes_over_the_next(
    rabbitmq_url: str,
) -> None:
    broken = replies(rabbitmq_url)
    broken.open(NAME)
    put(rabbitmq_url, range(1))
    assert taken(broken, 1) == [0]
    put(rabbitmq_url, range(1, 101))
    assert broken._is_readable(10.0)
    broken.drop()

    waiting = replies(rabbitmq_url)
    waiting.open(NAME)
    assert set(taken(waiting, 100)) >= set(range(1, 101))
    waiting.drop()


def test_what_was_taken_does_not_come_again(rabbitmq_url: str) -> None:
    first = replies(rabbitmq_url)
    first.open(NAME)
    put(rabbitmq_url, range(10))
    assert taken(first, 10) == [*range(10)]
    assert first.take(0.0) == []
    put(rabbitmq_url, range(10, 11))
    assert taken(first, 1) == [10]
    first.drop()

    second = replies(rabbitmq_url)
    second.open(NAME)
    assert taken(second, 1, within=5.0) in ([], [10])
    second.close(NAME)
    second.drop()
