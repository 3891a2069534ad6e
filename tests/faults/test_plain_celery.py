"""An ordinary Celery app on a database as its broker: what Celery can do, it does there too."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from celery import Celery, chain, chord, group

from tests.faults.conftest import PATIENCE, SHORT, Road
from tests.faults.test_worker_deaths import members
from tests.support.servers import ports

on_both = pytest.mark.parametrize("road", SHORT, indirect=True)


@pytest.fixture
def plain(road: Road) -> Road:
    """The road with an ordinary app."""
    road.app = "tests.faults.programs.plain_celery"
    road.environment["ROAD_RESULTS"] = f"db+{road.database}"
    return road


@pytest.fixture
def client(plain: Road) -> Iterator[Celery]:
    """Whoever publishes, and controls the workers."""
    app = Celery("plain", broker=plain.broker, backend=f"db+{plain.database}", set_as_current=False)
    yield app
    app.close()


def notes(road: Road) -> list[str]:
    """What was noted, in that order."""
    return [line.split()[0] for line in _lines(road)]


def moments(road: Road) -> list[float]:
    """When it was noted."""
    return [float(line.split()[1]) for line in _lines(road)]


def _lines(road: Road) -> list[str]:
    file = Path(road.folder, "notes")
    return file.read_text().splitlines() if file.exists() else []


def send(client: Celery, *what: Any, after: float = 0.0, **options: Any) -> list[Any]:
    return [client.send_task("plain.note", (each, after), **options) for each in what]


@pytest.mark.parametrize(
    ("road", "pool"),
    [
        *((road, pool) for road in SHORT for pool in ("prefork", "threads", "solo")),
        ("eda-postgresql", "gevent"),
    ],
    indirect=["road"],
)
def test_every_pool_does_each_task_once_and_ends_with_nothing_in_its_hands(
    plain: Road, client: Celery, pool: str
) -> None:
    worker = plain.worker(pool=pool)
    send(client, *range(200))

    plain.until(lambda: len(notes(plain)) >= 200, "all tasks")
    worker.signal(signal.SIGTERM)

    assert worker.wait() == 0
    assert sorted(map(int, notes(plain))) == list(range(200))
    assert plain.queued() == 0
    assert members(worker) == []


@on_both
def test_canvas_gives_the_right_results(plain: Road, client: Celery) -> None:
    plain.worker()
    notes = [client.signature("plain.note", (n,), immutable=True) for n in range(30)]

    chorded = chord(notes[:20], client.signature("plain.total")).apply_async()
    grouped = group(notes).apply_async()
    chained = chain(*notes[:4]).apply_async()

    assert chorded.get(timeout=PATIENCE) == sum(range(20))
    assert grouped.get(timeout=PATIENCE) == list(range(30))
    assert chained.get(timeout=PATIENCE) == 3


@on_both
def test_the_order_is_that_of_priority_then_that_of_sending(plain: Road, client: Celery) -> None:
    for what, priority in ((1, 0), (2, 9), (3, 5), (4, 9), (5, 0)):
        send(client, what, priority=priority)

    plain.worker("-c1", pool="solo")
    plain.until(lambda: len(notes(plain)) == 5, "all tasks")

    assert notes(plain) == ["2", "4", "3", "1", "5"]


@on_both
def test_a_countdown_ends_in_time_though_no_worker_held_it(plain: Road, client: Celery) -> None:
    begun = time.time()
    send(client, "late", countdown=3.0)
    send(client, "expired", countdown=3.0, expires=1.0)
    plain.worker("-c1")
    send(client, "soon")

    plain.until(lambda: "late" in notes(plain), "the late one")
    plain.until(lambda: plain.queued() == 0, "an empty queue")

    assert notes(plain) == ["soon", "late"]
    assert moments(plain)[1] - begun > 2.9


@on_both
def test_workers_answer_and_obey(plain: Road, client: Celery) -> None:
    for name in ("north@here", "south@here"):
        plain.worker("-n", name)
    control = client.control
    names = {"north@here", "south@here"}
    plain.until(lambda: set(control.inspect(timeout=1.0).ping() or {}) == names, "two workers")

    [running] = send(client, "running", after=60.0)
    plain.until(lambda: any((control.inspect(timeout=1.0).active() or {}).values()), "one active")
    [revoked] = send(client, "revoked", countdown=10.0)
    control.revoke(revoked.id)
    control.revoke(running.id, terminate=True, signal="SIGKILL")
    send(client, "other", countdown=11.0)
    plain.until(lambda: "other" in notes(plain), "the other one")

    assert notes(plain) == ["other"]
    plain.until(lambda: set(control.inspect(timeout=1.0).stats() or {}) == names, "both workers")
    active = control.inspect(timeout=30.0, limit=2).active()
    assert set(active) == names
    assert not any(active.values())


@on_both
def test_events_reach_whoever_listens_and_nobody_stores_them_otherwise(
    plain: Road, client: Celery
) -> None:
    plain.worker("-E")
    send(client, "unheard")
    plain.until(lambda: "unheard" in notes(plain), "a task")
    plain.until(lambda: plain.queued() == 0, "an empty queue")
    heard: list[str] = []

    def listen(event: dict[str, Any]) -> None:
        heard.append(event["type"])
        if event["type"] == "task-succeeded":
            receiver.should_stop = True

    with client.connection_for_read() as connection:
        receiver = client.events.Receiver(connection, handlers={"*": listen})
        with receiver.consumer_context():
            send(client, "heard")
            receiver.capture(limit=None, timeout=30, wakeup=False)

    assert {"task-received", "task-started", "task-succeeded"} <= set(heard)


@on_both
def test_flower_shows_workers_and_tasks(plain: Road, client: Celery) -> None:
    plain.worker("-E", "-n", "shown@%h")
    port = ports.claim()
    place = ("--address=127.0.0.1", f"--port={port}")
    plain.environment["FLOWER_UNAUTHENTICATED_API"] = "true"
    flower = plain._run(["celery", "-A", plain.app, "flower", *place], None)

    def asked(path: str) -> Any:
        try:
            with urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=10) as answer:
                return json.load(answer)
        except (URLError, ConnectionError, TimeoutError):
            return {}

    def workers() -> list[Any]:
        return [told for name, told in asked("workers?refresh=1").items() if "shown@" in name]

    plain.until(workers, "a worker")
    result = send(client, "for Flower")[0]

    plain.until(
        lambda: asked("tasks").get(result.id, {}).get("state") == "SUCCESS", "the task's success"
    )
    plain.until(  # Flower asks the worker for them in the background
        lambda: any("plain.note" in told.get("registered", ()) for told in workers()),
        "the worker's tasks",
    )
    flower.signal(signal.SIGTERM)
    flower.wait()


@on_both
@pytest.mark.parametrize("victim", ["main", "child"])
def test_a_killed_process_loses_no_task_that_is_acknowledged_late(
    plain: Road, client: Celery, victim: str
) -> None:
    plain.environment["ROAD_LATE"] = "1"
    worker = plain.worker()
    plain.worker("-n", "other@%h")
    send(client, *range(300), after=0.01)
    plain.until(lambda: len(notes(plain)) > 50, "a good part")

    if victim == "main":
        worker.signal(signal.SIGKILL)
    else:
        child = next(pid for pid in members(worker) if pid != worker.popen.pid)
        os.kill(child, signal.SIGKILL)
    plain.until(lambda: len(set(notes(plain))) == 300, "all tasks")
    plain.until(lambda: plain.queued() == 0, "an empty queue")

    assert sorted(set(map(int, notes(plain)))) == list(range(300))
    assert len(notes(plain)) <= 300 + 8  # twice what the killed one may have had in its hands
