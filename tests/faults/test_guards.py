"""Each guard is needed: with it removed, the fault it is there for does the harm it should prevent.

The same faults with every guard in place are in the other tests of this folder.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Road
from tests.support.servers.rabbitmq import RabbitMQ

ORDERS = 12
COMMITTED = 8


@pytest.fixture
def road(rabbitmq_url: str, postgresql_url: str, tmp_path: Path) -> Iterator[Road]:
    road = Road(rabbitmq_url, postgresql_url, tmp_path)
    yield road
    road.end()


def settled_effects(road: Road) -> int:
    """Effects after everything that could still come has come.

    A pool notices a lost child, and gives its message back, within six seconds.
    """
    road.settle(8.0)
    return road.effects().total()


def strike_worker(road: Road, step: str, mutation: str) -> None:
    road.worker(fault=road.fault(step), ROAD_MUTATION=mutation)
    road.relay()
    road.place(1, ORDERS)
    road.until(road.struck(step).exists, f"a worker at {step}")
    road.until(lambda: road.effects().total() >= COMMITTED - 1, "the other messages")


def test_without_an_inbox_a_redelivered_message_takes_effect_twice(road: Road) -> None:
    strike_worker(road, "delivery.committed", "no_inbox")

    assert settled_effects(road) == COMMITTED + 1
    assert max(road.effects().values()) == 2


def test_with_the_inbox_row_in_another_transaction_a_killed_handler_has_no_effect(
    road: Road,
) -> None:
    strike_worker(road, "inbox.admitted", "inbox_in_another_transaction")

    assert settled_effects(road) == COMMITTED - 1


@pytest.mark.parametrize("mutation", ["early_acknowledgement", "no_reject_on_worker_lost"])
def test_acknowledged_too_early_the_message_of_a_killed_worker_is_lost(
    road: Road, mutation: str
) -> None:
    strike_worker(road, "inbox.admitted", mutation)

    assert settled_effects(road) == COMMITTED - 1


def strike_worker_with(road: Road, step: str, mutation: str, **settings: object) -> None:
    road.environment["ROAD_SETTINGS"] = json.dumps(settings)
    strike_worker(road, step, mutation)


EARLY = {"*": {"acks_late": False, "reject_on_worker_lost": False, "rate_limit": "100/s"}}


def test_annotations_of_tasks_do_not_acknowledge_too_early(road: Road) -> None:
    strike_worker_with(road, "inbox.admitted", "", task_annotations=EARLY)

    assert settled_effects(road) == COMMITTED
    assert road.logged("road.charge has acks_late=False, reject_on_worker_lost=False, by") == 1


def test_if_annotations_of_tasks_stood_the_message_of_a_killed_worker_would_be_lost(
    road: Road,
) -> None:
    strike_worker_with(road, "inbox.admitted", "annotations_stand", task_annotations=EARLY)

    assert settled_effects(road) == COMMITTED - 1


def test_the_message_of_a_worker_that_is_lost_takes_effect_once_though_celery_would_retry_it(
    road: Road,
) -> None:
    retry = {"task_retry_on_worker_lost": True}
    strike_worker_with(road, "delivery.committed", "", **retry)

    assert settled_effects(road) == COMMITTED


def test_if_celery_retried_the_message_of_a_worker_that_is_lost_it_would_take_effect_twice(
    road: Road,
) -> None:
    again = {"*": {"default_retry_delay": 0}}
    strike_worker_with(
        road, "delivery.committed", "lost_workers_are_retried", task_annotations=again
    )

    assert settled_effects(road) == COMMITTED + 1


def test_acknowledged_too_early_a_failing_message_is_neither_in_the_queue_nor_a_dead_letter(
    road: Road,
) -> None:
    road.worker(fault=road.fault("inbox.admitted"), ROAD_MUTATION="early_acknowledgement")
    road.relay()
    road.run("with eda.transaction(): fail.delay(1)")
    road.until(road.struck("inbox.admitted").exists, "a worker at the failing message")
    road.place(1, ORDERS)
    road.until(lambda: road.effects().total() == COMMITTED, "the other messages")

    road.settle(2.0)

    assert road.dead() == []


def test_deleted_before_it_is_sent_the_message_of_a_killed_relay_is_lost(road: Road) -> None:
    road.worker()
    road.place(1, ORDERS)
    relay = road.relay(fault=road.fault("relay.claimed"), ROAD_MUTATION="deleted_before_it_is_sent")
    assert relay.wait() == -signal.SIGKILL
    road.relay()

    assert settled_effects(road) == 0


def test_without_confirms_a_killed_broker_loses_what_was_sent(
    road: Road, rabbitmq: RabbitMQ
) -> None:
    worker = road.worker()
    road.relay(ROAD_MUTATION="no_confirm")
    road.place(1, 3)
    road.until(lambda: road.effects().total() == 2, "the first messages")
    worker.kill()

    rabbitmq.freeze()
    road.place(4, ORDERS)
    road.until(lambda: road.waiting() == 0, "everything cleared from the outbox")
    rabbitmq.kill()
    rabbitmq.start()
    road.worker()

    assert settled_effects(road) < COMMITTED


def test_without_mandatory_a_message_without_a_queue_is_lost(road: Road) -> None:
    unroutable = "charge.apply_async((1,), exchange='amq.direct', routing_key='nowhere')"
    road.relay(ROAD_MUTATION="not_mandatory")
    road.run(f"with eda.transaction(): {unroutable}")

    road.until(lambda: road.waiting() == 0, "the message cleared from the outbox")

    assert road.dead() == []


def test_mandatory_a_message_without_a_queue_stays_and_says_why(road: Road) -> None:
    unroutable = "charge.apply_async((1,), exchange='amq.direct', routing_key='nowhere')"
    road.relay()
    road.run(f"with eda.transaction(): {unroutable}")

    road.until(lambda: "NO_ROUTE" in (road.last_error() or ""), "the broker's words on the row")

    assert road.waiting() == 1


def test_with_the_failed_attempts_rows_kept_a_retried_task_takes_effect_more_than_once(
    road: Road,
) -> None:
    road.worker(ROAD_MUTATION="retry_keeps_the_failed_attempt")
    road.relay()
    road.run("with eda.transaction(): flaky.delay(7)")
    road.until(lambda: road.effects("flaky")[7] == 3, "all attempts")

    assert road.effects("charge")[7] > 1


def test_with_the_failed_attempts_rows_undone_a_retried_task_takes_effect_once(
    road: Road,
) -> None:
    road.worker()
    road.relay()
    road.run("with eda.transaction(): flaky.delay(7)")
    road.until(lambda: road.effects("charge")[7] == 1, "the last attempt and what it published")

    road.settle(2.0)

    assert road.effects("flaky")[7] == 1
    assert road.effects("charge")[7] == 1


@pytest.fixture
def redis_road(redis_url: str, mariadb_url: str, tmp_path: Path) -> Iterator[Road]:
    road = Road(redis_url, mariadb_url, tmp_path)
    yield road
    road.end()


def kill_the_worker_that_a_message_is_handed_to(road: Road, mutation: str) -> None:
    """The worker waits for a message, stops before it can read it, and dies."""
    worker = road.worker(ROAD_MUTATION=mutation)
    relay = road.relay()
    road.place(1, 1)
    road.until(lambda: road.effects()[1] == 1, "a worker that waits for the next message")
    relay.signal(signal.SIGSTOP)
    road.place(2, 2)
    worker.signal(signal.SIGSTOP)
    relay.signal(signal.SIGCONT)
    road.settle(1.0)
    worker.kill()
    road.worker(ROAD_MUTATION=mutation)
    road.place(4, 4)
    road.until(lambda: road.effects()[4] == 1, "the new worker at work")


def test_a_message_handed_to_a_worker_that_dies_is_not_lost_on_redis(redis_road: Road) -> None:
    kill_the_worker_that_a_message_is_handed_to(redis_road, "")

    redis_road.until(lambda: redis_road.effects()[2] == 1, "the message that was handed to it")


def test_taken_as_kombu_does_a_message_handed_to_a_worker_that_dies_is_lost_on_redis(
    redis_road: Road,
) -> None:
    kill_the_worker_that_a_message_is_handed_to(redis_road, "kombu_takes_from_redis")

    redis_road.settle(6.0)

    assert redis_road.effects()[2] == 0
