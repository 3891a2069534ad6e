"""Messages whose dead letters are hard to write: they end too, and free their places."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from kombu import Connection
from sqlalchemy import select

from tests.faults.conftest import Process, Road, first_of
from tests.faults.programs.hostile_messages import Hand, Letter, call
from tests.faults.test_given_up import UNDELIVERED, left_in
from tests.faults.test_hostile import ready_worker

#: A limit for which the server has to allow larger packets than it does by default.
LARGE = 16 * 2**20
FAIL = "road.fail"

on_mariadb = pytest.mark.parametrize("road", ["redis-mariadb"], indirect=True)


@pytest.fixture
def hand(road: Road) -> Iterator[Hand]:
    hand = Hand(road.broker)
    yield hand
    hand.close()


def expect_a_worker_at_work(road: Road, worker: Process, hand: Hand, number: int = 1) -> None:
    hand.put(call(number))
    road.until(lambda: road.effects()[number], "a valid message handled")
    assert worker.alive


@on_mariadb
def test_messages_larger_than_a_packet_of_the_database_hold_up_no_worker(
    road: Road, hand: Hand
) -> None:
    worker = ready_worker(road)
    large = b'[["' + b"x" * 17 * 2**20 + b'"], {}, {}]'
    for number in range(9):  # more than are prefetched
        hand.put(Letter(f"large {number}", body=large))

    expect_a_worker_at_work(road, worker, hand)
    road.until(lambda: len(road.dead()) == 9, "the dead letters")

    assert {reason for _, reason in road.dead()} == {"too large"}
    columns = road.tables.dead_letters.c
    with road.engine.connect() as connection:
        headers = connection.scalars(select(columns.headers)).all()
    assert {json.loads(each)["eda_reduced"]["bytes"] for each in headers} == {len(large)}


@on_mariadb
def test_a_worker_is_refused_if_the_database_cannot_store_the_messages_that_it_would_handle(
    road: Road,
) -> None:
    worker = road.worker(ROAD_SETTINGS=json.dumps({"eda_max_message_bytes": LARGE}))

    assert worker.wait() != 0
    assert road.logged("max_allowed_packet")
    assert road.logged("eda_max_message_bytes")


@first_of("rabbitmq-postgresql", "redis-mariadb", "eda-postgresql")
def test_a_failing_message_with_the_largest_count_of_retries_is_a_dead_letter(
    road: Road, hand: Hand
) -> None:
    worker = ready_worker(road)
    for number in range(9):
        retries = {"retries": 2**31 - 2 - number % 2}
        hand.put(Letter(f"last {number}", headers={"task": FAIL, **retries}))

    expect_a_worker_at_work(road, worker, hand)
    road.until(lambda: len(road.dead()) == 9, "the dead letters")

    assert set(road.dead()) == {(FAIL, "retries exhausted")}


@first_of("redis-mariadb", "eda-postgresql")
def test_headers_nested_almost_too_deep_for_python_end_no_worker(road: Road, hand: Hand) -> None:
    worker = ready_worker(road)
    depths = range(280, 1000, 20)
    for depth in depths:
        deep: list[object] = []
        for _ in range(depth):
            deep = [deep]
        hand.put(Letter(f"deep {depth}", headers={"x": deep}))

    expect_a_worker_at_work(road, worker, hand)
    road.until(lambda: len(road.dead()) == len(depths), "the dead letters")


@pytest.mark.parametrize("road", ["rabbitmq-postgresql"], indirect=True)
def test_a_hostile_message_in_the_queue_of_those_given_up_ends_no_worker(
    road: Road, hand: Hand
) -> None:
    road.environment["ROAD_SETTINGS"] = json.dumps({"eda_delivery_limit": 9})
    worker = ready_worker(road)
    expect_a_worker_at_work(road, worker, hand)
    strange = [
        {"id": "\ud800"},
        {"id": "\ud800", "retries": 2**31 - 1},
        {"id": {"a": 1}},
        {"task": "\ud800", "eda_order": ["\0"] * 5},
        {"x-death": [{"queue": "\ud800", "exchange": 7, "reason": ["x"]}]},
        {"x-death": "x", "x-first-death-queue": {"a": 1}},
        {"x-first-death-queue": "eda.on.\ud800", "x-first-death-exchange": "eda.events"},
    ]
    with Connection(road.broker) as connection:
        channel = connection.default_channel
        for number, headers in enumerate(strange):
            letter = Letter(f"given up {number}", headers=headers)
            message = channel.prepare_message(
                letter.body,
                content_type=letter.content_type,
                content_encoding=letter.content_encoding,
                headers=letter.all_headers,
            )
            channel.basic_publish(message, exchange="", routing_key=UNDELIVERED)

    road.until(lambda: len(road.dead()) == len(strange), "the dead letters")
    expect_a_worker_at_work(road, worker, hand, 2)
    assert left_in(road, UNDELIVERED) == 0
