"""Processes that can be killed and restarted, and that never outlive the demo."""

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
#: Seconds within which processes have to exit before they are killed.
PATIENCE = 8.0

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_parent = os.getpid()


class Failed(Exception):
    """The demo cannot go on."""


class Process:
    """A process in its own process group, and its log file."""

    def __init__(
        self, name: str, command: Sequence[str | Path], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._environment = environment
        self.start()

    def start(self) -> None:
        """Start or restart the process."""
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                self._command,
                cwd=PROJECT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C reaches only the demo, which then stops the others in order.
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
        """SIGKILL the process and its children."""
        self._popen.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._popen.terminate()

    def wait(self, seconds: float) -> int:
        """Wait for the exit; returns the exit code.

        Raises:
            Failed: the process still runs after *seconds*.
        """
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.name} did not end in {seconds:.0f} s:\n{self.tail()}") from None

    def has_said(self, words: str) -> bool:
        """True if its log contains *words*."""
        return words in self.log.read_text(errors="replace")

    def tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])


def python(*arguments: str) -> list[str]:
    """The command that runs a Python module with this interpreter."""
    return [sys.executable, "-m", *arguments]


def end(processes: Iterable[Process]) -> None:
    """Terminate all *processes*; kill those that do not exit in time."""
    running = [each for each in processes if each.alive]
    for each in running:
        each.terminate()
    deadline = time.monotonic() + PATIENCE
    for each in running:
        with contextlib.suppress(Failed):
            each.wait(max(0, deadline - time.monotonic()))
        each.kill()


def _die_with_parent() -> None:
    """Let the kernel SIGKILL this process when the demo ends, even by SIGKILL.

    Celery does the same for the children of a prefork pool.
    """
    if _libc:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != _parent:  # the demo ended between the fork and the call
            os.kill(os.getpid(), signal.SIGKILL)
