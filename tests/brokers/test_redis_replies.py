"""What those who wait for replies leave in Redis, and what they cost those who ask."""

from __future__ import annotations

import threading
import time

import pytest
from celery import Celery
from redis import Redis as Client

from celery_eda.brokers.redis.replies import MARK, ReplyConsumer
from celery_eda.core import addresses
from tests.support.servers.redis import Redis
from tests.support.waiting import BOUND, eventually

NAME = addresses.of_process()


def replies(url: str, expires: float = 60.0) -> ReplyConsumer:
    return ReplyConsumer(Celery(broker=url, set_as_current=False), expires=expires)


def test_whoever_waits_is_woken_at_once(redis_url: str) -> None:
    waiting = replies(redis_url)
    waiting.open(NAME)
    started = time.monotonic()
    threading.Timer(0.2, waiting.wake).start()

    assert waiting.take(600.0) == []
    assert time.monotonic() - started < BOUND
    waiting.drop()


def test_to_wake_waits_for_no_server(redis_url: str, redis_server: Redis) -> None:
    waiting = replies(redis_url)
    waiting.open(NAME)
    redis_server.freeze()
    waking = threading.Thread(target=waiting.wake)
    try:
        waking.start()
        waking.join(BOUND)
        ended = not waking.is_alive()
    finally:
        redis_server.thaw()
    waking.join()
    waiting.drop()

    assert ended, "while the server was frozen"


def test_to_wake_those_who_are_gone_leaves_nothing_behind(redis_url: str) -> None:
    waiting = replies(redis_url)
    waiting.open(NAME)
    client = Client.from_url(redis_url)
    client.delete(NAME + MARK)
    client.config_resetstat()
    waiting.wake()
    eventually(lambda: {"cmdstat_eval", "cmdstat_lpush"} & set(client.info("commandstats")))

    assert client.keys("eda.*") == []
    waiting.drop()


@pytest.mark.parametrize("expires", [1.0, 2.0])
def test_a_queue_is_open_all_the_time_however_short_it_is_to_be_kept(
    redis_url: str, expires: float
) -> None:
    waiting, client = replies(redis_url, expires), Client.from_url(redis_url)
    waiting.open(NAME)
    closed, ended = [], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            if not client.exists(NAME + MARK):
                closed.append(time.monotonic())

    watching = threading.Thread(target=watch)
    watching.start()
    until = time.monotonic() + 4.0
    while time.monotonic() < until:
        waiting.take(1.0)
    ended.set()
    watching.join()
    waiting.drop()

    assert closed == []
