"""The demo kills, counts, and leaves nothing behind, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from tests.support import PROJECT

MARK = "CELERY_EDA_TEST_DEMO"
PATIENCE = 60.0


class Demo:
    """One run of the demo; all its processes carry a mark in their environment."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.mark = uuid4().hex
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "example_project.demo", *options],
            cwd=PROJECT,
            env={**os.environ, MARK: self.mark, "TMPDIR": str(folder), "SHOP_BROKER": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self) -> list[psutil.Process]:
        return [each for each in psutil.process_iter() if _environment(each).get(MARK) == self.mark]

    def wait_for(self, words: str) -> None:
        """Read its output up to a line with *words*."""
        assert self.popen.stdout
        seen = []
        for line in self.popen.stdout:
            seen.append(line)
            if words in line:
                return
        pytest.fail(f"the demo never said {words!r}:\n{''.join(seen)}")


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


@pytest.fixture
def demo(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Demo]:
    demo = Demo(tmp_path, *request.param)
    yield demo
    for each in demo.processes():
        each.kill()
    demo.popen.wait()


@pytest.mark.parametrize(
    "demo",
    [
        ("--orders", "120", "--seconds", "12"),
        pytest.param(
            ("--orders", "120", "--seconds", "12", "--broker", "valkey"), marks=pytest.mark.soak
        ),
    ],
    ids=["embedded", "valkey"],
    indirect=True,
)
def test_every_order_takes_effect_once_although_processes_are_killed(
    demo: Demo, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    output, _ = demo.popen.communicate()
    figures = json.loads(output.splitlines()[-1])

    assert demo.popen.returncode == 0, output
    assert figures["lost"] == figures["duplicated"] == figures["phantom"] == 0
    assert figures["published"] + figures["rolled_back"] == 120
    assert figures["rolled_back"] > 0
    assert figures["effects"] == 4 * figures["published"]
    assert figures["kills"] >= 9
    assert figures["broker_restarts"] == int("valkey" in request.node.name)
    assert demo.processes() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("demo", [("--orders", "3000", "--seconds", "300")], indirect=True)
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.soak),
        pytest.param(signal.SIGTERM, marks=pytest.mark.soak),
    ],
)
def test_no_process_outlives_a_demo_that_is_ended(demo: Demo, number: signal.Signals) -> None:
    demo.wait_for("staff")
    running = len(demo.processes())

    demo.popen.send_signal(number)
    demo.popen.wait(PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while demo.processes() and time.monotonic() < deadline:
        time.sleep(0.1)

    assert running > 15
    assert demo.processes() == []


ORPHAN = """
import os, time
from example_project.demo import processes

parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.01)
    processes._die_with_parent()
    print("outlived the demo")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of this end")
def test_a_process_does_not_outlive_a_demo_that_ends_right_after_the_fork() -> None:
    output = subprocess.run(
        [sys.executable, "-c", ORPHAN],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
        check=True,
    ).stdout

    assert output == ""
