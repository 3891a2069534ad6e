"""A database or broker for tests, that can be killed, frozen and restarted with its data.

A vendor adds how to find or start one, how to log in, and how to get a fresh database.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import ClassVar
from urllib.parse import urlsplit

from typing_extensions import Self

from tests.support.servers import docker
from tests.support.servers.errors import ServerFailed, ServerUnavailable
from tests.support.servers.hosts import Elsewhere, Host

SECONDS_BETWEEN_LOGINS = 0.05


class Server(ABC):
    """One server, on its host, reached at *url*."""

    name: ClassVar[str]
    variable: ClassVar[str]
    packages: ClassVar[str]
    start_timeout: ClassVar[float] = 30
    stop_timeout: ClassVar[float] = 30

    def __init__(self, host: Host, url: str) -> None:
        self.host = host
        self.url = url

    @classmethod
    def find(cls, root: Path) -> Self:
        """The server that the environment names, or a new one, with its data below *root*.

        A new one is not started yet. Raises ``ServerUnavailable`` where there is none.
        """
        if url := os.environ.get(cls.variable):
            return cls(Elsewhere(cls.variable), url)
        server = cls.local(root) or (cls.container() if docker.answers() else None)
        if server is None:
            raise ServerUnavailable(
                f"No {cls.name} here: install {cls.packages}, start a Docker engine, "
                f"or set {cls.variable} to the URL of one."
            )
        return server

    @classmethod
    @abstractmethod
    def local(cls, root: Path) -> Self | None:
        """A new one from programs of this machine; None without them."""

    @classmethod
    @abstractmethod
    def container(cls) -> Self:
        """A new one from its official image."""

    @abstractmethod
    def login(self) -> None:
        """Log in once, in at most 2 s; raises whatever the driver raises."""

    @property
    def port(self) -> int:
        """The port that clients connect to."""
        port = urlsplit(self.url).port
        assert port, f"The URL of {self.name} must name its port."
        return port

    @property
    def disposable(self) -> bool:
        """Whether it is ours to kill and freeze."""
        return self.host.disposable

    def start(self) -> None:
        """Have it running and answering, whether it was stopped, killed, frozen or neither."""
        if not self.host.alive:
            self.host.start()
        elif self.disposable:
            self.host.thaw()
        self.ready(self.start_timeout)

    def stop(self) -> None:
        """End it in good order; its data stay."""
        self.host.stop(self.stop_timeout)

    def restart(self) -> None:
        """Stop it in good order and start it: same port, same data."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """SIGKILL all its processes; what it made durable stays."""
        self.host.kill()

    def freeze(self) -> None:
        """SIGSTOP all its processes: connections stay open and nobody answers."""
        self.host.freeze()

    def thaw(self) -> None:
        """Let a frozen one go on where it was."""
        self.host.thaw()

    def ready(self, timeout: float) -> None:
        """Wait until a login succeeds; raises ``ServerFailed`` after *timeout* seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return self.login()
            except Exception as error:  # each driver has its own ways to say "not yet"
                if not self.host.alive or time.monotonic() > deadline:
                    state = f"no login in {timeout:g} s" if self.host.alive else "it ended"
                    raise ServerFailed(
                        f"{self.name} on port {self.port} is not ready: {state}. "
                        f"Last error: {error!r}. The end of its log:\n{self.host.log_tail()}"
                    ) from error
            time.sleep(SECONDS_BETWEEN_LOGINS)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.host.discard()
