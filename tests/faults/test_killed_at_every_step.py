"""At every step of the road a process is killed or frozen, and the effects are counted."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter

import pytest

from celery_eda.core import checkpoints
from tests.faults.conftest import SHORT, Process, Road, by_relay, on_servers, on_short_roads

ORDERS = 21
PRODUCER = ("publish.captured", "outbox.written", "publish.committed")
RELAY = tuple(step for step in checkpoints.STEPS if step.startswith("relay."))
#: Those for what is an ordinary message to a relay, and differs only in that a copy of it comes.
RELAY_COPIES = [
    each if each == "relay.confirmed" else pytest.param(each, marks=pytest.mark.soak)
    for each in RELAY
]
#: One batch is with the broker, or answered, and another one claimed.
BETWEEN_BATCHES = ("relay.confirmed", "relay.cleared")
SMALL_BATCHES = json.dumps({"eda_relay_batch": 4})
#: Reached only by messages that were parked: see ``test_drain``.
DRAIN = tuple(step for step in checkpoints.STEPS if step.startswith("drain."))
WORKER = tuple(step for step in checkpoints.STEPS if step not in PRODUCER + RELAY + DRAIN)


def expect_each_effect_once(road: Road) -> None:
    road.until(lambda: len(road.effects()) >= len(road.committed()), "all effects")
    road.until(lambda: road.queued() == 0, "every message acknowledged")
    road.settle(3.0 if road.broker.startswith("redis") else 1.0)

    assert road.committed() == Counter(n for n in range(1, ORDERS + 1) if n % 3)
    assert road.effects() == road.committed()


def restart_when_struck(road: Road, process: Process, step: str) -> None:
    """Do what a supervisor does, once the fault has struck."""
    road.until(road.struck(step).exists, f"somebody at {step}")
    if process.wait_briefly() is not None:
        process.start()


@on_servers
@pytest.mark.parametrize("step", PRODUCER)
def test_a_producer_killed_while_publishing_neither_loses_nor_invents(
    road: Road, step: str
) -> None:
    road.worker()
    road.relay()
    producer = road.producer(1, ORDERS, fault=road.fault(step), ROAD_SEND_AFTER_COMMIT="1")

    assert producer.wait() == -signal.SIGKILL, road.logs()
    road.place(1, ORDERS)

    expect_each_effect_once(road)


@on_short_roads
@pytest.mark.parametrize("step", PRODUCER)
def test_a_producer_killed_while_it_fills_a_queue_neither_loses_nor_invents(
    road: Road, step: str
) -> None:
    road.worker()
    producer = road.producer(1, ORDERS, fault=road.fault(step))

    assert producer.wait() == -signal.SIGKILL, road.logs()
    road.place(1, ORDERS)

    expect_each_effect_once(road)


@by_relay
@pytest.mark.parametrize("step", RELAY)
def test_a_killed_relay_is_taken_over(road: Road, step: str) -> None:
    road.worker()
    relay = road.relay(fault=road.fault(step))
    road.place(1, ORDERS)

    road.until(road.struck(step).exists, f"a relay at {step}")
    assert relay.wait() == -signal.SIGKILL, road.logs()
    road.relay()

    expect_each_effect_once(road)


@by_relay
@pytest.mark.parametrize("step", BETWEEN_BATCHES)
def test_a_relay_killed_with_two_batches_in_its_hands_is_taken_over(road: Road, step: str) -> None:
    road.worker()
    road.place(1, ORDERS)
    relay = road.relay(fault=road.fault(step), ROAD_SETTINGS=SMALL_BATCHES)

    road.until(road.struck(step).exists, f"a relay at {step}")
    assert relay.wait() == -signal.SIGKILL, road.logs()
    road.relay(ROAD_SETTINGS=SMALL_BATCHES)

    expect_each_effect_once(road)


@on_servers
@pytest.mark.parametrize("step", BETWEEN_BATCHES)
def test_a_relay_frozen_with_two_batches_in_its_hands_changes_nothing_when_it_wakes(
    road: Road, step: str
) -> None:
    road.worker()
    road.place(1, ORDERS)
    road.relay(fault=road.fault(step, "freeze"), ROAD_SETTINGS=SMALL_BATCHES)
    road.until(road.struck(step).exists, f"a relay at {step}")
    road.relay(ROAD_SETTINGS=SMALL_BATCHES)
    road.until(lambda: len(road.effects()) >= 14, "the other relay taking over")

    road.until(road.struck(step).read_text, "who is frozen")  # it is there before it says so
    os.kill(int(road.struck(step).read_text()), signal.SIGCONT)

    expect_each_effect_once(road)


@on_servers
@pytest.mark.parametrize("step", RELAY)
def test_a_frozen_relay_changes_nothing_when_it_wakes(road: Road, step: str) -> None:
    road.worker()
    road.relay(fault=road.fault(step, "freeze"))
    road.place(1, ORDERS)
    road.until(road.struck(step).exists, f"a relay at {step}")
    road.relay()
    road.until(lambda: len(road.effects()) >= 14, "the other relay taking over")

    road.until(road.struck(step).read_text, "who is frozen")  # it is there before it says so
    os.kill(int(road.struck(step).read_text()), signal.SIGCONT)

    expect_each_effect_once(road)


@pytest.mark.parametrize("step", [step for step in WORKER if step != "delivery.started"])
def test_a_killed_worker_is_taken_over(road: Road, step: str) -> None:
    worker = road.worker(fault=road.fault(step))
    road.relay()
    road.place(1, ORDERS)

    restart_when_struck(road, worker, step)

    expect_each_effect_once(road)


def test_a_worker_killed_while_it_counts_a_redelivery_is_taken_over(road: Road) -> None:
    faults = f"{road.fault('delivery.handled')},{road.fault('delivery.started')}"
    road.worker(fault=faults)
    road.relay()
    road.place(1, ORDERS)

    road.until(road.struck("delivery.started").exists, "a second kill")

    expect_each_effect_once(road)


@pytest.mark.parametrize(
    "road",
    [
        *("rabbitmq-postgresql", "redis-mariadb", *SHORT),
        pytest.param("redis-sqlite", marks=pytest.mark.soak),
    ],
    indirect=True,
)
@pytest.mark.parametrize("step", ["inbox.admitted", "delivery.handled"])
def test_a_handler_frozen_longer_than_its_transaction_may_last_takes_effect_once(
    road: Road, step: str
) -> None:
    road.worker(fault=road.fault(step, "freeze"))
    road.relay()
    road.place(1, ORDERS)
    road.until(road.struck(step).exists, f"a worker at {step}")
    if step == "inbox.admitted" or "sqlite" not in road.database:
        # SQLite has one writer: a frozen handler that has written stops all others.
        road.until(lambda: len(road.effects()) >= 13, "the others going on")
    road.pause(4.0, "longer than eda_claim_timeout, so that the server ends its transaction")

    road.until(road.struck(step).read_text, "who is frozen")  # it is there before it says so
    os.kill(int(road.struck(step).read_text()), signal.SIGCONT)

    expect_each_effect_once(road)
