"""Where a server runs, and what can be done to it there.

``LocalProcess`` is one that we start from a program on this machine, ``docker.Container`` one
that an engine runs for us, and ``Elsewhere`` one whose address we were given.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tests.support import PROJECT
from tests.support.servers import processes, programs
from tests.support.servers.errors import ServerFailed, ServerUnavailable


class Host(Protocol):
    """The lifetime of one server, whose data outlive a kill and a stop."""

    disposable: bool

    @property
    def alive(self) -> bool: ...
    @property
    def frozen(self) -> bool: ...
    def start(self) -> None: ...
    def stop(self, timeout: float) -> None: ...
    def kill(self) -> None: ...
    def freeze(self) -> None: ...
    def thaw(self) -> None: ...
    def discard(self) -> None: ...
    def run(self, command: Sequence[str], text: str = "") -> str: ...
    def log_tail(self) -> str: ...


class LocalProcess:
    """A server started from *command*, with everything it starts in turn."""

    disposable = True

    def __init__(
        self,
        command: Sequence[str | Path],
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.command = [str(word) for word in command]
        self.log = folder / "log"
        self._environment = {**os.environ, "PYTHONPATH": str(PROJECT), **(environment or {})}
        self._user = user
        self._stop_signal = stop_signal
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        """Whether it runs; a frozen one does."""
        return self._guard is not None and self._guard.poll() is None

    @property
    def frozen(self) -> bool:
        """Whether it was frozen and not thawed since."""
        return self._guard is not None and processes.frozen(self._guard.pid)

    @property
    def pids(self) -> list[int]:
        """The ids of all its processes."""
        return [each.pid for each in processes.below(self._guard.pid)] if self._guard else []

    def start(self) -> None:
        """Start it; returns before it is ready."""
        words = [str(os.getpid()), str(int(self._stop_signal)), self._user or "", *self.command]
        with self.log.open("ab") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "tests.support.servers.guard", *words],
                cwd=self.log.parent,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self, timeout: float) -> None:
        """Ask it to end, and wait for that; raises ``ServerFailed`` if it does not in time."""
        if self._guard is None:
            return
        self.thaw()
        self._guard.terminate()
        try:
            self._guard.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            tail = self.log_tail()
            raise ServerFailed(f"{self.command[0]} did not stop in {timeout} s:\n{tail}") from None

    def kill(self) -> None:
        """SIGKILL all its processes and wait until they are gone."""
        while self._guard is not None and self._guard.poll() is None:
            # Again and again: a guard that has just begun starts its server a moment later.
            processes.kill(self._guard.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.wait(0.05)

    def freeze(self) -> None:
        """SIGSTOP all its processes: connections stay open and nobody answers."""
        if self._guard is not None:
            processes.freeze(self._guard.pid)

    def thaw(self) -> None:
        """SIGCONT all its processes."""
        if self._guard is not None:
            processes.thaw(self._guard.pid)

    def discard(self) -> None:
        """End it for good, in no order."""
        self.kill()

    def run(self, command: Sequence[str], text: str = "") -> str:
        """What a program in the server's own environment printed, given *text*."""
        return programs.run(command, text=text, environment=self._environment)

    def log_tail(self) -> str:
        """The last 30 lines that it logged."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-30:]) or "(it logged nothing)"


class Elsewhere:
    """A server that somebody else runs: it can be used, and nothing can be done to it."""

    disposable = False
    alive = True
    frozen = False

    def __init__(self, variable: str) -> None:
        self._variable = variable

    def start(self) -> None:
        """Nothing to do: it runs."""

    def kill(self) -> None:
        """Refuse."""
        raise ServerUnavailable(
            f"The server of {self._variable} is not ours to stop, kill or freeze. "
            f"Unset {self._variable} to have a private one started."
        )

    def stop(self, timeout: float) -> None:
        """Refuse."""
        self.kill()

    freeze = thaw = kill

    def discard(self) -> None:
        """Nothing to do: it stays."""

    def run(self, command: Sequence[str], text: str = "") -> str:
        """Refuse."""
        raise ServerUnavailable(
            f"{command[0]} cannot be run beside the server of {self._variable}."
        )

    def log_tail(self) -> str:
        """Nothing: its log is not at hand."""
        return f"(the server of {self._variable} keeps its own log)"
