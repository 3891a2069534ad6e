"""A worker that may hold one message at a time takes the next one as soon as it is done."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from kombu.utils import eventio

from celery_eda.brokers.database.queueing import Queueing
from celery_eda.brokers.database.sqlite import SQLiteQueues
from tests.support.brokers import Broker

TASKS = 30
PATIENCE = 240.0
#: The shortest time-out of the event loop that counts as idling, in seconds.
IDLE = 0.1


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A worker takes the root logger for itself."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(params=["eda_sqlite", "eda_postgresql"])
def broker(request: pytest.FixtureRequest) -> Broker:
    """Every database that can be a broker."""
    found: Broker = request.getfixturevalue(f"{request.param}_broker")
    return found


@pytest.mark.parametrize("multiplier", [1, 4])
@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_the_event_loop_does_not_idle_while_messages_wait(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, pool: str, multiplier: int
) -> None:
    app = Celery("one", broker=broker.url, set_as_current=False)
    app.conf.update(worker_prefetch_multiplier=multiplier, task_acks_late=True)
    handled: list[int] = []

    @app.task(name="one.note")
    def note(number: int) -> None:
        handled.append(number)

    for number in range(TASKS):
        note.delay(number)
    for kind in (Queueing, SQLiteQueues):
        monkeypatch.setattr(kind, "poll_interval", PATIENCE)
    idle = 0
    poll = eventio._epoll.poll

    def counting(self: Any, timeout: float) -> Any:
        nonlocal idle
        events = poll(self, timeout)
        idle += not events and timeout >= IDLE and 0 < len(handled) < TASKS
        return events

    monkeypatch.setattr(eventio._epoll, "poll", counting)

    with start_worker(
        app, pool=pool, concurrency=1, perform_ping_check=False, shutdown_timeout=60.0
    ):
        deadline = time.monotonic() + PATIENCE
        while len(handled) < TASKS:
            assert time.monotonic() < deadline, handled
            time.sleep(0.05)

    assert sorted(handled) == list(range(TASKS))
    assert idle <= TASKS // 10
