"""Each goal's script says in one line of JSON what it measured, and what it could not.

Nothing here looks at how fast anything was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from benchmarks import figures, report
from benchmarks.pairing import interleaved
from benchmarks.result import Check, Result
from tests.support import PROJECT
from tests.support.servers.postgresql import PostgreSQL
from tests.support.servers.rabbitmq import RabbitMQ
from tests.support.servers.redis import Redis

PEERS = {"django_celery_outbox", "faststream_outbox", "procrastinate"}
WORDS = {"goal", "ratio", "target", "met", "runs", "spread", "medians", "compared", "versions"}


def line_of(goal: str, **servers: str) -> dict[str, Any]:
    """What the script of *goal* prints, at a scale at which its figures mean nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", goal, "--json", "--scale", "0.005"],
        check=True,
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT), **servers},
        capture_output=True,
        text=True,
        timeout=120,
    )
    line: dict[str, Any] = json.loads(done.stdout)
    assert line.keys() >= WORDS, done.stderr
    return line


def test_a_goal_prints_its_ratio_its_target_and_its_verdict(
    postgresql: PostgreSQL, redis_server: Redis
) -> None:
    line = line_of(
        "S2",
        **{PostgreSQL.variable: postgresql.url, Redis.variable: redis_server.url},
    )

    assert line["goal"] == "S2"
    assert line["target"] == "≥ 0.5"
    assert line["met"] == (line["ratio"] >= 0.5 and line["checks"][1]["ratio"] >= 15)
    assert line["spread"][0] <= line["ratio"] <= line["spread"][1]
    assert line["cpu_us_per_message"]["ours"] > 0
    assert line["runs"] == len(line["samples"]["ours"])


def test_a_peer_that_is_not_there_is_said_to_be_missing(
    postgresql: PostgreSQL, rabbitmq: RabbitMQ
) -> None:
    line = line_of(
        "S3",
        **{PostgreSQL.variable: postgresql.url, RabbitMQ.variable: rabbitmq.url},
    )

    measured = {name.partition(",")[0] for name in line["medians"]}
    missing = {name for name in PEERS if find_spec(name) is None}
    assert measured == {"ours", "plain .delay()", *PEERS} - missing
    assert line["not_compared"].keys() == missing
    assert all("No module named" in why for why in line["not_compared"].values())


def test_cases_take_turns_and_warm_up_runs_do_not_count() -> None:
    order: list[str] = []

    given = interleaved(
        {name: lambda name=name: order.append(name) or len(order) for name in "ab"},  # type: ignore[misc]
        rounds=2,
    )

    assert order == ["b", "a", "a", "b", "b", "a"]
    assert given == {"a": [3, 6], "b": [4, 5]}


def test_a_ratio_is_the_median_of_those_of_the_rounds() -> None:
    over, under = [2.0, 30.0, 6.0], [1.0, 10.0, 3.0]

    check = Check.of("a ÷ b", figures.ratios(over, under), at_most=2.5)

    assert check.ratio == 2.0
    assert check.spread == [2.0, 3.0]
    assert check.met is True


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.0, 1)])
def test_a_percentile_is_one_of_the_values(share: float, expected: int) -> None:
    assert figures.percentile(list(range(1, 101)), share) == expected


def test_a_goal_is_met_only_if_all_its_conditions_are() -> None:
    held, failed = Check("a", 1.0, 0.5, at_least=True), Check("b", 1.0, 0.5, at_least=False)
    unknown = Check("c", None, 0.5, at_least=True, why="nothing could be measured")

    verdicts = [
        Result("S1", checks, runs=1, medians={}, compared="").met
        for checks in ([held], [held, failed], [held, unknown], [held, unknown, failed])
    ]

    assert verdicts == [True, False, None, False]


def test_the_table_shows_what_was_not_measured() -> None:
    bare = {"goal": "S5", "ratio": None, "target": None, "met": None, "why": "its script failed"}
    machine = {"disturbed": True, "cores": 2, "python": "3.13", "versions": {}}

    page = report.table([{**bare, **machine, "runs": 0}], {})

    assert "| S5 | its script failed | – | | | no verdict |" in page
    assert "these figures are disturbed" in page
