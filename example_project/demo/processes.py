"""Processes that can be killed and started again, and that never outlive the demo."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

PROJECT = Path(__file__).parents[2]
PR_SET_PDEATHSIG = 1  # linux/prctl.h
#: Seconds that processes have to end by themselves before they are killed.
PATIENCE = 8.0

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_parent = os.getpid()


class Failed(Exception):
    """The demo cannot go on."""


class Process:
    """One process in a group of its own, and the file that it logs to."""

    def __init__(
        self, name: str, command: Sequence[str | Path], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._environment = environment
        self.start()

    def start(self) -> None:
        """Start it, for the first time or again."""
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                self._command,
                cwd=PROJECT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C is for the demo alone, which then ends all others in good order.
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  # the demo has no threads
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def kill(self) -> None:
        """SIGKILL it; what it started goes with it."""
        self._popen.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()

    def terminate(self) -> None:
        """Ask it to end."""
        self._popen.terminate()

    def wait(self, seconds: float) -> int:
        """Its exit code.

        Raises:
            Failed: it still runs after *seconds*.
        """
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.name} did not end in {seconds:.0f} s:\n{self.tail()}") from None

    def has_said(self, words: str) -> bool:
        """Whether *words* are in its log."""
        return words in self.log.read_text(errors="replace")

    def tail(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])


def python(*arguments: str) -> list[str]:
    """The command that runs a Python module with this interpreter."""
    return [sys.executable, "-m", *arguments]


def end(processes: Iterable[Process]) -> None:
    """End all of them, in good order if they can."""
    running = [each for each in processes if each.alive]
    for each in running:
        each.terminate()
    deadline = time.monotonic() + PATIENCE
    for each in running:
        with contextlib.suppress(Failed):
            each.wait(max(0, deadline - time.monotonic()))
        each.kill()


def _die_with_parent() -> None:
    """Have the system SIGKILL this process when the demo is gone, even if by SIGKILL itself.

    Celery does the same for the children of a prefork pool.
    """
    if _libc:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != _parent:  # gone already, in the moment since the fork
            os.kill(os.getpid(), signal.SIGKILL)
