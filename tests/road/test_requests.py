"""Requests and replies between processes: each finds its own, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from celery_eda import EDA
from tests.road.conftest import Road

ADDRESSES = ("correlation", "temporary", "durable")


@pytest.fixture
def eda(road: Road) -> Iterator[EDA]:
    """Whoever asks: this process, as a client of the road on the same database."""
    app = Celery("road", broker=road.broker, set_as_current=False)
    app.conf.update(
        eda_database_url=road.database, eda_reply_expires=2.0, task_default_queue="road"
    )
    eda = EDA(app)
    yield eda
    eda.mailbox.close()
    eda.engine.dispose()
    eda.relay_engine.dispose()


def ask(eda: EDA, number: int, **options: Any) -> Any:
    return eda.request("road.quote", (number,), **options)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_request_gets_its_reply(road: Road, eda: EDA, address: str) -> None:
    road.worker(ROAD_SEND_AFTER_COMMIT="1")
    road.relay()

    with eda.transaction():
        replies = [ask(eda, number, address=address) for number in range(20)]

    assert [reply.get(timeout=60) for reply in replies] == [2 * number for number in range(20)]
