"""Booking trips: each answer comes to the one who asked, in every way of asking."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support import PROJECT


def test_every_answer_comes_to_the_one_who_asked(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "example_project.booking"],
        cwd=PROJECT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )

    assert told.returncode == 0, told.stdout + told.stderr
    assert json.loads(told.stdout.splitlines()[-1]) == {
        "order_id": 124,
        "passengers": ["Ada", "Bob"],
        "numbers": ["LH454-0001", "LH454-0002"],
        "after_a_crash": "LH454-0003",
        "sold_out": True,
        "reply_queues_left": 0,
    }
    assert list(tmp_path.iterdir()) == []
