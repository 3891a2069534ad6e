"""A type checker finds wrong arguments of ``.delay()``, with the session left out."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support import PROJECT


def test_a_type_checker_finds_wrong_arguments_and_no_others() -> None:
    pytest.importorskip("mypy", reason="mypy comes with the lint extra")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "setup.cfg", "tests/typing/calls.py"],
        check=False,
        cwd=PROJECT,
        env={**os.environ, "MYPYPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )

    assert checked.returncode == 0, checked.stdout
