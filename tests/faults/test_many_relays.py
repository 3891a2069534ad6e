"""Relays side by side: each message leaves, once, and in whatever order its transaction commits."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from tests.faults.conftest import PATIENCE, Road, expect_hits
from tests.support.letters import connection_to
from tests.support.servers.base import Server

ROWS = 10_000
BATCH = 200
# Time enough for an answer on a busy machine: what is under way is a copy then, and no mistake.
UNHURRIED = {
    "ROAD_SETTINGS": f'{{"eda_relay_batch": {BATCH}, "eda_publish_timeout": 30}}',
    "ROAD_CLAIM_TIMEOUT": "60",
}
FILL = f"""
for start in range(0, {ROWS}, 500):
    with eda.transaction():
        for number in range(start, start + 500):
            charge.delay(number)
"""
HOLD = """
from pathlib import Path
with eda.databases.engine.connect() as late, eda.transaction(late):
    charge.delay(0)
    late.begin_nested()
    Path(os.environ["ROAD_FOLDER"], "held").touch()
    wait_for("others-left", seconds=600)
    late.commit()
"""
OTHERS = """
for number in range(1000):
    with eda.transaction():
        charge.delay(number)
"""

rabbitmq_and_redis = pytest.mark.parametrize(
    "road", ["rabbitmq-postgresql", "redis-mariadb"], indirect=True
)
locking = rabbitmq_and_redis  # a database with one writer has no transactions to overtake


def wire(road: Road) -> Counter[str]:
    """How often each message is in the queue, which is then empty."""
    take = taken_from_redis if road.broker.startswith("redis") else taken_from_rabbitmq
    return Counter(headers["eda_id"] for headers in take(road.broker))


def taken_from_redis(url: str) -> list[dict[str, Any]]:
    """The headers of all messages, in one step: kombu takes four for each message."""
    with redis.Redis.from_url(url) as client, client.pipeline() as pipeline:
        messages, _ = pipeline.lrange("road", 0, -1).delete("road").execute()
    return [json.loads(each)["headers"] for each in messages]


def taken_from_rabbitmq(url: str) -> list[dict[str, Any]]:
    """The headers of all messages, as a consumer gets them: many in one go."""
    found: list[dict[str, Any]] = []
    with connection_to(url) as connection:
        channel = connection.channel()
        _, number, _ = channel.queue_declare("road", passive=True)
        channel.basic_consume(
            "road", no_ack=True, callback=lambda message: found.append(message.headers)
        )
        while len(found) < number:
            connection.drain_events(timeout=PATIENCE)
    return found


def copies(found: Counter[str]) -> int:
    return found.total() - len(found)


@pytest.mark.parametrize(
    ("road", "relays"),
    [
        ("rabbitmq-postgresql", 4),
        pytest.param("redis-mariadb", 4, marks=pytest.mark.soak),
        ("redis-sqlite", 2),
    ],
    indirect=["road"],
)
def test_relays_side_by_side_send_each_message_once(road: Road, relays: int) -> None:
    road.run(FILL)

    for _ in range(relays):
        road.relay(**UNHURRIED)
    road.until(lambda: road.waiting() == 0, "an empty outbox", 240)

    found = wire(road)
    expect_hits(len(found), f"messages sent by {relays} relays, {copies(found)} copies")
    assert len(found) == ROWS
    assert copies(found) == 0


@pytest.mark.parametrize(
    ("road", "relays"),
    [
        pytest.param("rabbitmq-postgresql", 2, marks=pytest.mark.soak),
        pytest.param("rabbitmq-postgresql", 4, marks=pytest.mark.soak),
        pytest.param("rabbitmq-postgresql", 8, marks=pytest.mark.soak),
        pytest.param("redis-mariadb", 2, marks=pytest.mark.soak),
        pytest.param("redis-mariadb", 4, marks=pytest.mark.soak),
        ("redis-mariadb", 8),
        pytest.param("redis-sqlite", 2, marks=pytest.mark.soak),
    ],
    indirect=["road"],
)
def test_an_outage_in_the_middle_costs_a_copy_only_of_what_was_under_way(
    road: Road, broker: Server, relays: int
) -> None:
    road.run(FILL)
    for _ in range(relays):
        road.relay(**UNHURRIED)
    road.until(lambda: road.waiting() < ROWS, "the first messages sent", 240)

    broker.kill()
    left = road.waiting()
    broker.start()
    road.until(lambda: road.waiting() == 0, "an empty outbox", 240)

    found = wire(road)
    expect_hits(left, f"messages left when the broker died under {relays} relays")
    expect_hits(ROWS - left, f"sent before; in the end there are {copies(found)} copies")
    assert len(found) == ROWS
    assert copies(found) <= relays * BATCH


def overtake(road: Road, seconds: float) -> None:
    """Hold the transaction with the lowest outbox id open until 1000 others have left."""
    with ThreadPoolExecutor() as threads:
        # It lives as long as all that comes below.
        late = threads.submit(road.run, HOLD, patience=600, ROAD_CLAIM_TIMEOUT="600")
        road.until((road.folder / "held").exists, "the lowest id taken")
        road.run(OTHERS, patience=300)
        road.relay()
        road.until(lambda: road.waiting() == 0, "the others sent")
        road.pause(seconds, "the transaction stays open that long")
        before = wire(road)
        (road.folder / "others-left").touch()
        late.result()
    road.until(lambda: road.waiting() == 0, "an empty outbox")
    after = wire(road)

    expect_hits(len(before), "messages with higher ids committed earlier")
    assert len(before) == 1000
    assert len(after) == 1
    assert copies(before) == copies(after) == 0


@locking
def test_a_transaction_that_commits_late_is_not_skipped(road: Road) -> None:
    overtake(road, seconds=3)


@pytest.mark.soak
@locking
def test_a_transaction_that_commits_very_late_is_not_skipped(road: Road) -> None:
    overtake(road, seconds=30)
