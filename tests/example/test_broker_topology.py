"""The shop that is moved by events, on databases of three kinds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support import PROJECT


def test_every_order_has_its_end_and_a_service_that_joins_later_misses_nothing(
    tmp_path: Path, postgresql_url: str, mariadb_url: str
) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "example_project.broker_topology"],
        cwd=PROJECT,
        env={
            **os.environ,
            "TMPDIR": str(tmp_path),
            "SHOP_PAYMENT_DATABASE": postgresql_url,
            "SHOP_KITCHEN_DATABASE": mariadb_url,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )

    assert told.returncode == 0, told.stdout + told.stderr
    assert json.loads(told.stdout.splitlines()[-1]) == {
        "delivered": 11,
        "discarded": 13,
        "paid": 7 * 450 + 4 * 500,
        "points": 7 * 450 + 4 * 500,
        "missing": 0,
    }
    assert list(tmp_path.iterdir()) == []
