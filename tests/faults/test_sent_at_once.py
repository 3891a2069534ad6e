"""What is no call of a task leaves a reliable handler at once, and fails nothing.

Control commands, events, progress over ``rpc://`` and messages of kombu; see decision 0019.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Road

#: Asks for everything, and looks at what has come; fails if something has not.
CLIENT = """
import threading, time
from tests.faults.programs.plain_messages import *

def until(condition, what):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)

def inspected(method):
    found = getattr(app.control.inspect(timeout=5.0, limit=1), method)() or {}
    return [each for worker in found.values() for each in worker]

def limits():
    found = app.control.inspect(timeout=5.0, limit=1).registered("rate_limit") or {}
    return [each for worker in found.values() for each in worker]

progress = []

def capture():
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(
            connection, handlers={"task-progress": progress.append, "*": lambda event: None}
        )
        for _ in receiver.itercapture(limit=None, timeout=None, wakeup=True):
            pass

threading.Thread(target=capture, daemon=True).start()

with app.connection_for_write() as connection:
    for number, way in enumerate(WAYS, start=1):
        if way not in ("by_state", "by_event"):
            with eda.transaction():
                say.delay(way, number)
    numbers = {way: number for number, way in enumerate(WAYS, start=1)}
    queue = connection.SimpleQueue(RAW)
    raw = sorted(queue.get(timeout=120).payload["number"] for _ in range(2))
    assert raw == [numbers["by_producer"], numbers["by_pool"]], raw
expected = {f"revoked {numbers[way]}" for way in ("by_revoke", "by_result")}
until(lambda: expected <= set(inspected("revoked")), "the revoked ones")
limit = f"{LIMITED} [rate_limit={numbers['by_broadcast']}/s]"
until(lambda: limit in limits(), limit)

def say_again():
    say.delay("by_event", numbers["by_event"])
    return progress

until(say_again, "a progress event")
assert progress[0]["percent"] == numbers["by_event"]

seen = []
result = say.delay("by_state", numbers["by_state"])
assert result.get(timeout=120, on_message=lambda message: seen.append(message["status"]))
assert "PROGRESS" in seen, seen
"""


@pytest.fixture(params=["rabbitmq_url", "redis_url"])
def road(request: pytest.FixtureRequest, postgresql_url: str, tmp_path: Path) -> Iterator[Road]:
    road = Road(request.getfixturevalue(request.param), postgresql_url, tmp_path)
    road.app = "tests.faults.programs.plain_messages"
    road.environment |= {"ROAD_RESULTS": "rpc://", "ROAD_EMBEDDED_RELAY": "1"}
    yield road
    road.end()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_what_is_no_call_leaves_a_handler_at_once(road: Road, pool: str) -> None:
    road.worker("-E", pool=pool)
    road.until(lambda: road.logged(" ready."), "the worker")

    road.run(CLIENT, patience=400)
    road.settle()

    assert road.dead() == []
    assert set(road.effects("say")) == set(range(1, 9))
    assert road.effects("say") - Counter({7: 10**6}) == Counter([1, 2, 3, 4, 5, 6, 8])
