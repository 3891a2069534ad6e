"""The process of a contestant, driven line by line, so that all are measured alike."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Self

from tests.support import PROJECT

#: Seconds within which a contestant has to exit.
GOODBYE = 10.0


@dataclass(frozen=True)
class Measured:
    """The cost of one call, by the contestant's own clocks.

    Attributes:
        value: the returned value.
        seconds: the elapsed time.
        cpu: seconds of CPU of the process, all threads.
        machine: seconds of CPU of all processes of the machine, servers included.
    """

    value: Any
    seconds: float
    cpu: float
    machine: float


class ContestantFailed(Exception):
    """A contestant exited or raised; the message has its output."""


class Contestant:
    """``python -m benchmarks.contestants.<module>``, which exits with this process."""

    def __init__(self, module: str, environment: Mapping[str, str], log: Path) -> None:
        self.module = module
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.contestants.{module}"],
                cwd=PROJECT,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        assert self._process.stdin
        try:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait(GOODBYE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def do(self, verb: str, *arguments: Any) -> Measured:
        """Call *verb*, and wait for the result."""
        self.begin(verb, *arguments)
        return self.end()

    def begin(self, verb: str, *arguments: Any) -> None:
        """Start a call of *verb*; :meth:`end` waits for the result."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps([verb, arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            """It is gone, and :meth:`end` says so."""

    def tell(self) -> None:
        """Ask the running call to finish."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> Measured:
        """The result of the call that :meth:`begin` started.

        Raises:
            ContestantFailed: the call failed.
        """
        assert self._process.stdout
        answer = self._process.stdout.readline()
        if not answer:
            said = self._said()
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise ContestantFailed(f"{self.module} is gone: {last}\n{said}")
        match json.loads(answer):
            case {"error": error}:
                raise ContestantFailed(f"{self.module}: {error}\n{self._said()}")
            case measured:
                return Measured(**measured)

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]
