"""The demo's own faults strike whoever is there, and nobody else."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from typing import Any, cast

import pytest

from example_project.demo.faults import Faults


def test_a_pool_child_that_has_ended_meanwhile_costs_no_strike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    there = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    answers = iter([[("a@host", gone.pid, "x")], [], [("a@host", there.pid, "y")]])
    monkeypatch.setattr(Faults, "_busy_children", lambda _: next(answers))
    monkeypatch.setattr(Faults, "_children", lambda _: [])
    faults = Faults(cast("Any", None), None, random.Random(1))

    assert faults.kill_pool_child() == f"SIGKILL pool child {there.pid} of a, busy with y"
    assert faults.kills == 1
    assert there.wait() == -signal.SIGKILL
