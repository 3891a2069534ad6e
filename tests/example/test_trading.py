"""The bulk trades: one account waits for its repair, whoever does it, and the others do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import PROJECT


@pytest.mark.parametrize(
    ("options", "mended_by"), [((), "the repairer"), (("--by-hand",), "a person")]
)
def test_the_trades_of_an_account_take_effect_in_their_order_once_one_is_mended(
    tmp_path: Path, options: tuple[str, ...], mended_by: str
) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "example_project.trading", *options],
        cwd=PROJECT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )

    assert told.returncode == 0, told.stdout + told.stderr
    assert json.loads(told.stdout.splitlines()[-1]) == {
        "placed": 100,
        "executed": 100,
        "in_order": True,
        "mended_by": mended_by,
    }
    assert list(tmp_path.iterdir()) == []
