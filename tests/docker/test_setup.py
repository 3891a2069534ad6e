"""pytest-celery's smoke tests, and what celery_eda adds: effects that are counted."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from celery import chain, chord, group
from pytest_celery import RESULT_TIMEOUT, CeleryTestSetup
from pytest_celery.vendors.worker.tasks import add, add_replaced
from pytest_docker_tools.exceptions import ContainerFailed

from celery_eda import EDA
from tests.docker.nodes import running
from tests.support.servers.hosts import LocalProcess

Effects = Callable[[], Counter[tuple[str, int]]]


def test_a_worker_with_eda_runs_ordinary_tasks(celery_setup: CeleryTestSetup) -> None:
    ready = celery_setup.ready(ping=True, control=True)
    results = [add.delay(1, 2), add_replaced.delay(3, 4)]

    assert ready
    assert [each.get(timeout=RESULT_TIMEOUT) for each in results] == [3, 7]


def test_a_task_published_in_a_transaction_takes_effect_and_returns_its_result(
    celery_setup: CeleryTestSetup, eda: EDA, effects: Effects
) -> None:
    with eda.transaction():
        result = celery_setup.app.send_task("shop.charge", (7,))

    assert result.get(timeout=RESULT_TIMEOUT) == 7
    assert effects() == {("charge", 7): 1}


def test_a_canvas_published_in_a_transaction_takes_effect_once_at_each_step(
    celery_setup: CeleryTestSetup, eda: EDA, effects: Effects
) -> None:
    def task(name: str, *args: int):  # type: ignore[no-untyped-def]
        return celery_setup.app.signature(f"shop.{name}", args)

    with eda.transaction():
        results = [
            chain(task("add", 1, 2), task("add", 10), task("add", 100)).apply_async(),
            group(task("charge", 1), task("charge", 2)).apply_async(),
            chord([task("charge", 3), task("charge", 4)], task("total")).apply_async(),
        ]

    assert [each.get(timeout=RESULT_TIMEOUT) for each in results] == [113, [1, 2], 7]
    steps = [("add", 3), ("add", 13), ("add", 113), ("total", 7)]
    assert effects() == Counter([*steps, *(("charge", number) for number in (1, 2, 3, 4))])


def test_a_task_whose_worker_was_killed_takes_effect_once_in_the_next_one(
    celery_setup: CeleryTestSetup, eda: EDA, effects: Effects
) -> None:
    with eda.transaction():
        result = celery_setup.app.send_task("shop.hold", (7,))
    celery_setup.worker.assert_log_exists("holding 7")
    celery_setup.worker.kill()
    before = effects()
    celery_setup.worker.restart()

    assert result.get(timeout=RESULT_TIMEOUT) == 7
    assert before == {}
    assert effects() == {("hold", 7): 1}


def test_what_commits_while_the_broker_is_down_takes_effect_once_when_it_is_back(
    celery_setup: CeleryTestSetup, eda: EDA, effects: Effects
) -> None:
    celery_setup.broker.kill()
    with eda.transaction():
        results = [celery_setup.app.send_task("shop.charge", (number,)) for number in range(5)]
    celery_setup.broker.restart()

    assert [each.get(timeout=RESULT_TIMEOUT) for each in results] == [0, 1, 2, 3, 4]
    assert effects() == Counter(("charge", number) for number in range(5))


@pytest.mark.parametrize("timeout", [0, 2])
def test_a_worker_that_never_gets_ready_has_ended_all_the_same(
    tmp_path: Path, timeout: int
) -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)", str(tmp_path)]

    with (
        pytest.raises(ContainerFailed, match="did not get ready"),
        running(LocalProcess(sleeper, tmp_path), timeout),
    ):
        pass
    assert sleeper not in [each.info["cmdline"] for each in psutil.process_iter(["cmdline"])]
