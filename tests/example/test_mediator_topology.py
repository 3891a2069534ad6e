"""The shop that a saga moves, on databases of three kinds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support import PROJECT


def test_every_order_has_its_end_also_when_the_barista_is_absent_and_the_manager_decides(
    tmp_path: Path, postgresql_url: str, mariadb_url: str
) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "example_project.mediator_topology"],
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
        "delivered": 10,
        "discarded": 14,
        "paid": 7 * 450 + 3 * 500,
        "missing": 0,
        "apologies": 14,
        "wasted": 2,
    }
    assert list(tmp_path.iterdir()) == []
