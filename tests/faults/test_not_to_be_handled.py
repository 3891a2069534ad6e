"""Messages that came too late, were revoked or overran their limit: none goes without a trace."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import select

from tests.faults.conftest import Process, Road

both_brokers = pytest.mark.parametrize(
    "road", ["rabbitmq-postgresql", "redis-mariadb"], indirect=True
)


def ready_worker(road: Road, **environment: str) -> Process:
    """A worker with a relay beside it that is ready to be told something."""
    results = f"db+{road.database}"
    road.environment.update(ROAD_EMBEDDED_RELAY="1", ROAD_RESULTS=results)
    worker = road.worker(**environment)
    road.until(lambda: road.logged(" ready."), "a worker that is ready")
    return worker


def result(road: Road, task_id: str) -> Any:
    return Celery(backend=f"db+{road.database}").AsyncResult(task_id)


@both_brokers
def test_an_expired_message_becomes_a_dead_letter(road: Road) -> None:
    road.run("charge.apply_async((1,), task_id='late', expires=0.5)")
    road.pause(1.0, "it has to expire")
    ready_worker(road)
    road.place(1, 2)

    road.until(road.dead, "a dead letter")
    road.until(lambda: result(road, "late").ready(), "a result")
    road.until(lambda: road.effects() == road.committed(), "the other messages")

    assert road.dead() == [("road.charge", "expired")]
    assert result(road, "late").state == "REVOKED"
    columns = road.tables.dead_letters.c
    with road.engine.connect() as connection:
        row = connection.execute(select(columns.properties, columns.headers)).one()
    assert "expiration" not in json.loads(row.properties)
    assert json.loads(row.headers)["expires"]


@both_brokers
def test_left_to_celery_an_expired_message_vanishes(road: Road) -> None:
    road.run("charge.apply_async((1,), task_id='late', expires=0.5)")
    road.pause(1.0, "it has to expire")
    ready_worker(road, ROAD_MUTATION="celery_drops_what_is_revoked")

    road.until(lambda: result(road, "late").ready(), "a result")
    road.settle()

    assert road.dead() == []


@both_brokers
def test_a_revoked_message_becomes_a_dead_letter(road: Road) -> None:
    worker = ready_worker(road)
    road.run("app.control.revoke('unwanted')")
    road.until(lambda: road.logged("flagged as revoked"), "the worker knows")

    road.run("charge.apply_async((1,), task_id='unwanted')")
    road.run("charge.apply_async((2,))")
    road.until(road.dead, "a dead letter")
    road.until(road.effects, "the other message")
    road.until(lambda: result(road, "unwanted").ready(), "a result")

    assert road.dead() == [("road.charge", "revoked")]
    assert road.effects() == Counter([2])
    assert result(road, "unwanted").state == "REVOKED"
    assert worker.alive


@pytest.mark.parametrize("road", ["rabbitmq-postgresql"], indirect=True)
def test_a_message_whose_process_is_ended_on_demand_becomes_a_dead_letter(road: Road) -> None:
    ready_worker(road)
    road.run("slow.apply_async((1, 600), task_id='endless')")
    road.until(lambda: road.logged("[endless] received"), "the worker has it")
    road.pause(1.0, "it has to be running")

    road.run("app.control.revoke('endless', terminate=True)")
    road.until(road.dead, "a dead letter")

    assert road.dead() == [("road.slow", "revoked")]
    assert road.effects("slow") == Counter()
