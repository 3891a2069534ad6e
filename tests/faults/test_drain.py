"""Parked messages are handled one after the other, from the database, whatever dies meanwhile."""

from __future__ import annotations

import json
import signal
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import select

from celery_eda.core import checkpoints
from tests.faults.conftest import SHORT, Process, Road, expect_hits, first_of
from tests.faults.programs.tables import effects
from tests.support.servers.proxy import Proxy

ACCOUNTS, MESSAGES = 2, 12
#: What the log says of each message that was handed on.
HANDED_ON = "was parked; its turn has come"
#: What each message reaches in the worker, after its predecessor has handed it on.
STEPS = (
    *(step for step in checkpoints.STEPS if step.startswith("drain.")),
    "delivery.received",
    "inbox.admitted",
    "delivery.handled",
    "delivery.committed",
)
#: Redis must not redeliver the first message of a drain before its end.
PATIENT = {
    "ROAD_SETTINGS": json.dumps(
        {"broker_transport_options": {"visibility_timeout": 300, "unacked_restore_interval": 1}}
    )
}
on_rabbitmq = pytest.mark.parametrize("road", ["rabbitmq-postgresql"], indirect=True)


def park(
    road: Road,
    arguments: str = "",
    accounts: int = ACCOUNTS,
    each: int = MESSAGES,
    options: str = "",
) -> None:
    """Have *each* messages of every account parked behind a first one that has failed for good."""
    barred(road).touch()
    worker, relay = road.worker("-n", "parking@%h"), road.relay()
    road.run(
        f"""
with eda.transaction():
    for number in range(1, {each + 2}):
        for account in range({accounts}):
            stand.apply_async((account, number{arguments}), {options})
"""
    )
    road.until(lambda: road.parked() == accounts * each, "all behind the first parked")
    road.until(lambda: len(road.dead()) == accounts, "the first ones dead letters")
    for process in (worker, relay):
        process.signal(signal.SIGTERM)
        process.wait()
    barred(road).unlink()


def visible(road: Road) -> dict[str, str]:
    """The environment of a worker that has time for a drain."""
    return PATIENT if road.broker.startswith("redis") else {}


def barred(road: Road) -> Path:
    return road.folder / "barred"


def let_go(road: Road) -> None:
    """Send the first message of each account again."""
    command = ["celery", "-A", road.app, "eda", "dead-letters", "redrive", "--all", "--yes"]
    assert road._run(command, None).wait() == 0, road.logs()


def in_order(road: Road) -> dict[str, list[int]]:
    """The numbers of each account, in the order in which they took effect."""
    taken = defaultdict(list)
    query = select(effects.c.name, effects.c.number).order_by(effects.c.id)
    with road.engine.connect() as connection:
        for name, number in connection.execute(query.where(effects.c.name.like("account %"))):
            taken[name].append(number)
    return taken


def expect_all_in_order(road: Road, accounts: int = ACCOUNTS, each: int = MESSAGES) -> None:
    road.until(lambda: road.parked() == 0, "nobody parked")
    road.until(lambda: road.queued() == 0, "every message acknowledged")
    road.settle(3.0 if road.broker.startswith("redis") else 1.0)

    assert in_order(road) == {
        f"account {account}": list(range(1, each + 2)) for account in range(accounts)
    }
    assert open_letters(road) == []


def open_letters(road: Road) -> list[str]:
    columns = road.tables.dead_letters.c
    return road._all(select(columns.reason).where(columns.state == "open"))


def end(worker: Process) -> None:
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0


@pytest.mark.parametrize("road", ["rabbitmq-postgresql", "redis-mariadb"], indirect=True)
def test_parked_messages_do_not_wait_behind_the_queue(road: Road) -> None:
    """Sent again, each would wait until those before it in the queue are handled."""
    backlog = 120
    park(road, accounts=1)
    let_go(road)
    road.run(f"with eda.transaction():\n    for n in range({backlog}): charge.delay(n)")
    relay = road.relay()
    road.until(lambda: road.waiting() == 0, "everything in the queue")
    relay.kill()
    road.worker("-n", "draining@%h", **visible(road))
    road.relay()

    expect_all_in_order(road, accounts=1)
    road.until(lambda: len(road.effects()) == backlog, "the backlog")
    with road.engine.connect() as connection:
        names = list(connection.scalars(select(effects.c.name).order_by(effects.c.id)))
    behind = names[names.index("account 0") :].count("charge")
    last = len(names) - 1 - names[::-1].index("account 0")
    assert names[last:].count("charge") > 0, f"the last one came after all {behind}"


@pytest.mark.parametrize(
    ("road", "pool"),
    [
        ("rabbitmq-postgresql", "prefork"),
        ("rabbitmq-postgresql", "gevent"),
        ("redis-mariadb", "threads"),
        ("eda-sqlite", "solo"),
        *(
            pytest.param(*each, marks=pytest.mark.soak)
            for each in (
                *(("rabbitmq-postgresql", pool) for pool in ("threads", "solo")),
                ("redis-mariadb", "solo"),
                ("redis-sqlite", "prefork"),
                *(("eda-sqlite", pool) for pool in ("prefork", "threads")),
                *(("eda-postgresql", pool) for pool in ("prefork", "threads", "solo", "gevent")),
            )
        ),
    ],
    indirect=["road"],
)
def test_every_pool_hands_on_what_is_parked(road: Road, pool: str) -> None:
    park(road)
    let_go(road)
    road.relay()
    worker = road.worker("-n", "draining@%h", pool=pool, ROAD_ASYNC="0", **visible(road))

    expect_all_in_order(road)
    assert road.logged(HANDED_ON) == ACCOUNTS * MESSAGES
    end(worker)


@pytest.mark.parametrize(
    "road",
    [
        "rabbitmq-postgresql",
        *(
            pytest.param(each, marks=pytest.mark.soak)
            for each in ("redis-mariadb", "redis-sqlite", *SHORT)
        ),
    ],
    indirect=True,
)
@pytest.mark.parametrize("step", STEPS)
def test_a_process_that_dies_in_a_drain_changes_nothing(road: Road, step: str) -> None:
    park(road)
    let_go(road)
    road.relay()
    # The first of each account came from the broker; a process has at most both of them.
    worker = road.worker("-n", "draining@%h", fault=road.fault(step, nth=ACCOUNTS + 2))
    road.until(road.struck(step).exists, f"a death at {step}")
    if not worker.alive or worker.wait_briefly() is not None:
        worker.start()

    expect_all_in_order(road)
    expect_hits(road.logged(HANDED_ON), "messages handed on")


@on_rabbitmq
def test_a_frozen_drain_changes_nothing(road: Road) -> None:
    park(road)
    let_go(road)
    road.relay()
    worker = road.worker("-n", "frozen@%h", fault=road.fault("drain.taken", "freeze", nth=4))
    road.until(road.struck("drain.taken").exists, "a frozen worker")
    road.worker("-n", "other@%h")
    worker.kill()

    expect_all_in_order(road)


@on_rabbitmq
def test_a_parked_message_that_kills_its_worker_once_is_counted_and_takes_effect(
    road: Road,
) -> None:
    park(road, ", 'kill' if number == 5 else ''")
    let_go(road)
    road.relay()
    road.worker("-n", "draining@%h")

    expect_all_in_order(road)
    with road.engine.connect() as connection:
        assert connection.execute(select(road.tables.attempts)).all() == []


@first_of("rabbitmq-postgresql", "redis-mariadb")
def test_a_parked_message_that_always_kills_its_worker_becomes_a_dead_letter(road: Road) -> None:
    park(road, ", 'kill always' if (account, number) == (0, 5) else ''")
    let_go(road)
    road.relay()
    road.worker("-n", "draining@%h", ROAD_MAX_DELIVERIES="2")
    road.until(lambda: open_letters(road), "a dead letter")
    road.until(lambda: len(in_order(road)["account 1"]) == MESSAGES + 1, "the other account")
    road.settle()

    assert open_letters(road) == ["lost worker"]
    assert in_order(road)["account 0"] == [1, 2, 3, 4]
    assert road.parked() == MESSAGES - 3


@on_rabbitmq
def test_each_parked_message_has_time_limits_of_its_own(road: Road) -> None:
    """Together they take longer than one may."""
    park(road, ", '', 0.5", accounts=1, each=8)
    let_go(road)
    road.relay()
    limits = json.dumps({"task_time_limit": 3, "task_soft_time_limit": 2})
    road.worker("-n", "draining@%h", ROAD_SETTINGS=limits)

    expect_all_in_order(road, accounts=1, each=8)
    assert road.logged("time limit") == 0
    assert road.logged(HANDED_ON) == 8


@on_rabbitmq
def test_a_parked_message_that_always_exceeds_its_limit_becomes_a_dead_letter(road: Road) -> None:
    park(road, ", '', 600 if number == 4 else 0", accounts=1)
    let_go(road)
    road.relay()
    limit = json.dumps({"task_time_limit": 2})
    road.worker("-n", "draining@%h", ROAD_SETTINGS=limit, ROAD_MAX_DELIVERIES="1")
    road.until(lambda: open_letters(road), "a dead letter")

    assert open_letters(road) == ["time limit"]
    assert in_order(road)["account 0"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("road", "pool"),
    [
        ("rabbitmq-postgresql", "prefork"),
        pytest.param("rabbitmq-postgresql", "threads", marks=pytest.mark.soak),
        pytest.param("redis-mariadb", "solo", marks=pytest.mark.soak),
        ("eda-postgresql", "threads"),
    ],
    indirect=["road"],
)
def test_a_worker_that_is_told_to_end_ends_its_drain(road: Road, pool: str) -> None:
    messages = 20
    park(road, ", '', 0.5", accounts=1, each=messages)
    let_go(road)
    road.relay()
    worker = road.worker("-n", "first@%h", pool=pool)
    road.until(lambda: len(in_order(road)["account 0"]) > 2, "a drain")
    end(worker)
    left = road.parked()
    road.worker("-n", "second@%h", pool=pool)

    expect_all_in_order(road, accounts=1, each=messages)
    assert left > messages // 2


@on_rabbitmq
def test_what_celery_does_with_a_message_it_does_with_a_parked_one(road: Road) -> None:
    """Its result is stored, its link called, its events are sent, under its own id."""
    results = f"db+{road.database}"
    road.environment["ROAD_RESULTS"] = results
    name = "task_id=f'{account}.{number}'"
    park(road, accounts=1, each=6, options=f"{name}, link=charge.si(number)")
    let_go(road)
    road.relay()
    road.worker("-n", "draining@%h", "-E")

    expect_all_in_order(road, accounts=1, each=6)
    backend = Celery(backend=results)
    parked = range(2, 8)
    road.until(lambda: len(road.effects()) == 7, "all links")
    assert road.effects() == Counter(range(1, 8))
    assert {n: backend.AsyncResult(f"0.{n}").result for n in parked} == {n: n for n in parked}
    seen = [json.loads(line) for line in (road.folder / "requests").read_text().splitlines()]
    assert [each["id"] for each in seen] == ["0.1", *(f"0.{number}" for number in range(1, 8))]
    assert {each["routing_key"] for each in seen} == {"road"}
    assert not any(each["redelivered"] for each in seen)


@on_rabbitmq
def test_a_parked_message_that_expires_meanwhile_becomes_a_dead_letter(road: Road) -> None:
    park(road, accounts=1, each=4, options="expires=1 if number == 3 else None")
    road.pause(1.0, "the message expires")
    let_go(road)
    road.relay()
    road.worker("-n", "draining@%h")
    road.until(lambda: open_letters(road), "a dead letter")

    assert open_letters(road) == ["expired"]
    assert in_order(road)["account 0"] == [1, 2]


@on_rabbitmq
def test_a_drain_that_loses_its_connection_changes_nothing(road: Road, broker_wire: Proxy) -> None:
    messages = 24
    park(road, ", '', 0.1", accounts=1, each=messages)
    let_go(road)
    road.relay()
    road.worker("-n", "draining@%h")
    for number in (3, 9, 15):
        road.until(lambda number=number: len(in_order(road)["account 0"]) > number, "a drain")  # type: ignore[misc]
        broker_wire.cut()

    expect_all_in_order(road, accounts=1, each=messages)


@on_rabbitmq
@pytest.mark.parametrize(
    "mutation", ["first_message_is_acknowledged_at_once", "copies_pass_on_nothing"]
)
def test_without_the_delivery_or_its_copy_a_key_stands_still_after_a_death(
    road: Road, mutation: str
) -> None:
    park(road)
    let_go(road)
    road.relay()
    fault = road.fault("delivery.handled", nth=ACCOUNTS + 2)
    road.worker("-n", "draining@%h", fault=fault, ROAD_MUTATION=mutation)
    road.until(road.struck("delivery.handled").exists, "a death")
    road.until(lambda: road.parked() < MESSAGES, "the end of the other account")
    road.settle(8.0)

    assert road.parked() > 0
