"""A server in a Docker container, where an engine answers and nothing is installed.

Not run by anybody yet: no machine of ours had an engine. A container outlives a test process
that is killed; ``docker ps --filter label=celery-eda-tests`` shows what was left.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from tests.support.servers import programs
from tests.support.servers.errors import ServerFailed


def answers() -> bool:
    """Whether an engine runs here."""
    try:
        programs.run(["docker", "version", "--format", "{{.Server.Version}}"])
    except ServerFailed:
        return False
    return True


class Container:
    """One container; its port *inside* is *port* outside."""

    disposable = True

    def __init__(
        self,
        image: str,
        port: int,
        inside: int,
        words: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._name = f"celery-eda-{uuid.uuid4().hex[:12]}"
        settings = [f"--env={name}={value}" for name, value in (environment or {}).items()]
        published = f"--publish=127.0.0.1:{port}:{inside}"
        place = [f"--name={self._name}", "--label=celery-eda-tests", published]
        self._docker("create", *place, *settings, image, *words)

    @property
    def alive(self) -> bool:
        """Whether it runs; a frozen one does."""
        return self._docker("inspect", "--format={{.State.Running}}", self._name) == "true\n"

    @property
    def frozen(self) -> bool:
        """Whether it was frozen and not thawed since."""
        return self._docker("inspect", "--format={{.State.Paused}}", self._name) == "true\n"

    def start(self) -> None:
        """Start it; returns before it is ready."""
        self._docker("start", self._name)

    def stop(self, timeout: float) -> None:
        """Ask it to end, and kill it after *timeout* seconds."""
        self.thaw()
        self._docker("stop", f"--time={timeout:.0f}", self._name)

    def kill(self) -> None:
        """SIGKILL all its processes."""
        if self.alive:
            self._docker("kill", self._name)

    def freeze(self) -> None:
        """Stop the time for all its processes."""
        self._docker("pause", self._name)

    def thaw(self) -> None:
        """Let them go on."""
        if self.frozen:
            self._docker("unpause", self._name)

    def discard(self) -> None:
        """Kill it and remove it with its data."""
        self._docker("rm", "--force", "--volumes", self._name)

    def run(self, command: Sequence[str], text: str = "") -> str:
        """What a program inside it printed, given *text*."""
        return self._docker("exec", "--interactive", self._name, *command, text=text)

    def log_tail(self) -> str:
        """The last 30 lines that it logged."""
        return self._docker("logs", "--tail=30", self._name)

    def _docker(self, *words: str, text: str = "") -> str:
        return programs.run(["docker", *words], text=text)
