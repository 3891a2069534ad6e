"""Hostile messages at a real worker: it lives, keeps each one with its reason, and goes on."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select

from tests.faults.conftest import SHORT, Process, Road
from tests.faults.programs.hostile_messages import (
    CALL,
    MOST,
    Hand,
    Letter,
    call,
    letters,
    strange_payloads,
    unreadable_octets,
)
from tests.support.servers.base import Server

LIMITS = json.dumps({"eda_max_decompressed_bytes": MOST, "eda_max_message_bytes": 2**21})
#: Bytes by which the worker's main process may grow: a bomb would need ten times more.
GROWTH = 64 * 2**20
BATCH = 12

both_brokers = pytest.mark.parametrize(
    "road", ["rabbitmq-postgresql", "redis-mariadb"], indirect=True
)
on_rabbitmq = pytest.mark.parametrize("road", ["rabbitmq-postgresql"], indirect=True)
on_redis = pytest.mark.parametrize("road", ["redis-mariadb", "redis-sqlite"], indirect=True)


@pytest.fixture
def hand(road: Road) -> Iterator[Hand]:
    hand = Hand(road.broker)
    yield hand
    hand.close()


def ready_worker(road: Road, **options: Any) -> Process:
    """A worker that has declared its queue and waits for messages."""
    before = road.logged(" ready.")
    worker = road.worker(**options)
    road.until(lambda: road.logged(" ready.") > before, "a worker that is ready")
    return worker


class Watch:
    """A worker under attack."""

    def __init__(self, road: Road, hand: Hand, **environment: str) -> None:
        self.road = road
        self.hand = hand
        self.calls = 0
        self.worker = ready_worker(road, ROAD_SETTINGS=LIMITS, **environment)
        self.expect_service()
        self.peak = self._peak()
        self.lines = len(self.log())

    def expect_service(self) -> None:
        """The next valid message is handled, by the same process."""
        self.calls += 1
        self.hand.put(call(self.calls))
        self.road.until(lambda: self.road.effects()[self.calls], "a valid message handled")

        assert self.worker.alive

    def expect_dead(self, number: int) -> None:
        self.road.until(lambda: len(dead(self.road)) >= number, f"{number} dead letters", 20.0)

        assert len(dead(self.road)) == number

    def expect_bounded_memory(self) -> None:
        growth = self._peak() - self.peak
        print(f"grown by {growth / 2**20:.1f} MiB at the most")  # noqa: T201

        assert growth < GROWTH

    def log(self) -> list[str]:
        """The lines that the worker has logged, but for those of handled tasks."""
        text = self.worker.log.read_text(errors="replace")
        lines = [line for line in text.split("\n") if line]
        return [line for line in lines if " received" not in line and "succeeded in" not in line]

    def expect_one_line_each(self, number: int) -> None:
        lines = self.log()[self.lines :]

        assert len(lines) == number, "\n".join(lines)
        assert all("dead letter: " in line for line in lines)
        assert all(line.isprintable() and len(line) < 600 for line in lines)

    def _peak(self) -> int:
        """The most memory that the worker's main process ever had, in bytes."""
        assert psutil.pid_exists(self.worker.popen.pid)
        status = Path(f"/proc/{self.worker.popen.pid}/status").read_text()
        return next(int(each.split()[1]) for each in status.splitlines() if "VmHWM" in each) * 1024


def dead(road: Road) -> list[Any]:
    with road.engine.connect() as connection:
        return list(connection.execute(select(road.tables.dead_letters)).all())


def of(rows: list[Any], name: str) -> Any:
    """The one dead letter that has *name* in its headers or its body."""
    found = [row for row in rows if name in row.headers or name.encode() in bytes(row.body)]
    assert len(found) == 1, (name, found)
    return found[0]


def is_again(row: Any) -> bool:
    """True if the letter of *row* was put a second time, under another name."""
    return "again" in row.headers or b"again case" in bytes(row.body)


def batches(everything: list[Letter]) -> Iterator[list[Letter]]:
    for start in range(0, len(everything), BATCH):
        yield everything[start : start + BATCH]


@pytest.mark.parametrize("road", ["rabbitmq-postgresql", "redis-mariadb", *SHORT], indirect=True)
def test_no_message_stops_a_worker_or_vanishes(road: Road, hand: Hand, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    everything = list(letters(str(trap)))
    watch = Watch(road, hand)

    for batch in batches(everything):
        for letter in batch:
            hand.put(letter)
        watch.expect_service()
    for letter in everything[::9]:
        hand.put(Letter(f"again {letter.name}", headers={**letter.headers, "retries": -1}))
        watch.expect_service()
    again = len(everything[::9])
    watch.expect_dead(len(everything) + again)

    assert len(everything) > 60
    assert not trap.exists()
    rows = dead(road)
    for letter in everything:
        row = of([each for each in rows if not is_again(each)], letter.name)
        assert row.reason == letter.reason, (letter.name, row.reason, row.error)
        assert bytes(row.body) == (letter.body if letter.stored is None else letter.stored)
        assert json.loads(row.headers) == letter.all_headers
        assert row.content_type == letter.content_type
        assert row.routing_key == "road"
        assert row.error
    watch.expect_one_line_each(len(everything) + again)
    watch.expect_bounded_memory()


@on_rabbitmq
def test_properties_that_the_client_library_cannot_read_stop_no_worker(
    road: Road, hand: Hand
) -> None:
    watch = Watch(road, hand)

    cases = unreadable_octets()
    for name, octets in cases.items():
        hand.put_octets(octets, name.encode())
        watch.expect_service()
    watch.expect_dead(len(cases))

    for name, octets in cases.items():
        row = of(dead(road), name)
        assert row.reason == "malformed"
        assert b64encode(octets).decode() in row.headers
    watch.expect_one_line_each(len(cases))


@on_redis
def test_what_is_no_message_at_all_stops_no_worker(road: Road, hand: Hand) -> None:
    watch = Watch(road, hand)

    cases = strange_payloads(hand)
    for payload in cases.values():
        hand.push(payload)
        watch.expect_service()
    watch.expect_dead(len(cases))

    rows = dead(road)
    for name, payload in cases.items():
        if row := next((each for each in rows if bytes(each.body) == payload), None):
            assert row.reason == "malformed"
        else:
            assert bytes(of(rows, name).body) == CALL
    redis = hand.channel.client
    road.until(lambda: not redis.hlen("unacked"), "all acknowledged")
    road.until(lambda: not redis.llen("celery_eda.malformed"), "nothing set aside")
    watch.expect_one_line_each(len(cases))


@both_brokers
def test_a_worker_killed_before_it_acknowledges_a_dead_letter_writes_no_second_one(
    road: Road, hand: Hand
) -> None:
    ready_worker(road, fault=road.fault("refusal.kept"))
    hand.put(Letter("killer", body=b"null"))
    road.until(road.struck("refusal.kept").exists, "a worker killed with its dead letter written")
    watch = Watch(road, hand)

    road.until(lambda: not left(hand), "the message gone from the broker", 20.0)
    watch.expect_service()

    assert [row.reason for row in dead(road)] == ["malformed"]


def left(hand: Hand) -> int:
    """Messages that the broker still has in the queue of the road, ready or not acknowledged."""
    if hand.redis:
        return hand.channel.client.llen("road") + hand.channel.client.hlen("unacked")
    return hand.channel.queue_declare("road", passive=True).message_count


@both_brokers
def test_while_the_database_is_away_a_refused_message_stays_with_the_broker(
    road: Road, hand: Hand, database: Server
) -> None:
    watch = Watch(road, hand)

    database.kill()
    for number in range(3):
        hand.put(Letter(f"refused {number}", body=b"null"))
    road.until(lambda: road.logged("cannot be written yet") >= 1, "a try in vain")
    assert watch.worker.alive
    database.start()

    road.until(lambda: len(dead(road)) == 3, "the dead letters")
    watch.expect_service()
    assert {of(dead(road), f"refused {number}").reason for number in range(3)} == {"malformed"}


def kill_the_worker_that_refuses_while_the_database_is_away(
    road: Road, hand: Hand, database: Server, mutation: str
) -> None:
    worker = ready_worker(road, ROAD_MUTATION=mutation)
    hand.put(call(1))
    road.until(lambda: road.effects()[1], "a worker at work")
    database.kill()
    hand.put(Letter("refused", body=b"null"))
    road.until(lambda: road.logged("cannot be written yet") >= 1, "a try in vain")
    worker.kill()
    database.start()
    ready_worker(road, ROAD_MUTATION=mutation)
    hand.put(call(2))
    road.until(lambda: road.effects()[2], "the next worker at work")


@both_brokers
def test_a_message_refused_by_a_worker_that_dies_before_its_dead_letter_is_written_is_not_lost(
    road: Road, hand: Hand, database: Server
) -> None:
    kill_the_worker_that_refuses_while_the_database_is_away(road, hand, database, "")

    road.until(lambda: [row.reason for row in dead(road)] == ["malformed"], "the dead letter")
    road.until(lambda: not left(hand), "the message gone from the broker")


@both_brokers
def test_acknowledged_before_its_dead_letter_is_written_a_refused_message_is_nowhere(
    road: Road, hand: Hand, database: Server
) -> None:
    kill_the_worker_that_refuses_while_the_database_is_away(
        road, hand, database, "acknowledged_before_it_is_kept"
    )

    road.until(lambda: not left(hand), "the message gone from the broker")
    road.pause(4.0, "nothing tells that it will not come back")

    assert dead(road) == []


@both_brokers
@pytest.mark.parametrize("body", [b"null", b'{"a": 1}', b""])
def test_without_the_inspection_a_single_message_stops_the_worker(
    road: Road, hand: Hand, body: bytes
) -> None:
    worker = ready_worker(road, ROAD_MUTATION="celery_looks_first")
    hand.put(call(1))
    road.until(lambda: road.effects()[1], "a worker at work")

    hand.put(Letter("killer", body=body))

    road.until(lambda: not worker.alive, "the end of the worker")


@both_brokers
@pytest.mark.parametrize(
    "letter",
    [
        Letter("truncated", body=CALL[:-9]),
        Letter("unknown", headers={"task": "no.such.task"}),
        Letter("no date", headers={"eta": "not-a-date"}),
    ],
    ids=lambda letter: letter.name,
)
def test_without_the_inspection_a_message_vanishes(road: Road, hand: Hand, letter: Letter) -> None:
    ready_worker(road, ROAD_MUTATION="celery_looks_first")
    hand.put(letter)
    hand.put(call(1))
    road.until(lambda: road.effects()[1], "the next message")

    road.until(lambda: not left(hand), "the message gone from the broker")

    assert dead(road) == []
