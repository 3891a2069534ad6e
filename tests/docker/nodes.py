"""pytest-celery's containers without Docker: private servers and worker processes.

Only the containers are replaced. Nodes, clusters and ``celery_setup`` are pytest-celery's own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from pytest_celery import (
    CeleryTestContainer,
    CeleryWorkerContainer,
    RabbitMQContainer,
    RedisContainer,
)
from pytest_docker_tools.exceptions import ContainerFailed

from tests.support.servers.base import Server
from tests.support.servers.hosts import Host, LocalProcess

#: Seconds that a worker may take to get ready, on a busy machine.
START_TIMEOUT = 60.0
STOP_TIMEOUT = 30.0


class LocalContainer(CeleryTestContainer):
    """What is asked of every container, answered for *host*."""

    def __init__(self, name: str, host: Host) -> None:
        # Not the base class's: it wraps a container of an engine.
        self.host = host
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @property
    def id(self) -> str:
        return self._name

    @property
    def status(self) -> str:
        return "running" if self.host.alive else "exited"

    def logs(self) -> str:
        """What it logged last."""
        return self.host.log_tail()

    def reload(self) -> None:
        """Nothing to do: everything here is asked anew each time."""


class LocalServer(LocalContainer):
    """A server that all tests share, with a *url* for this test alone."""

    def __init__(self, server: Server, url: str) -> None:
        super().__init__(server.name, server.host)
        self.server = server
        self._url = url

    @property
    def url(self) -> str:
        return self._url

    @property
    def host_url(self) -> str:
        return self._url

    @property
    def hostname(self) -> str:
        return str(urlsplit(self.url).hostname)

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def vhost(self) -> str:
        return urlsplit(self.url).path[1:]

    def ready(self) -> bool:
        self.server.ready(self.server.start_timeout)
        return True

    def kill(self, signal: str = "SIGKILL") -> None:
        """SIGKILL it; every other signal stops it in good order."""
        if signal == "SIGKILL":
            self.server.kill()
        else:
            self.server.stop()

    def restart(self, timeout: float = STOP_TIMEOUT) -> None:
        """Stop it in good order, if it runs, and start it: same port, same data."""
        self.server.restart()


class LocalRedis(LocalServer, RedisContainer):
    """A Redis database."""


class LocalRabbitMQ(LocalServer, RabbitMQContainer):
    """A virtual host of RabbitMQ."""


class LocalWorker(LocalContainer, CeleryWorkerContainer):
    """A ``celery worker``."""

    def __init__(self, host: LocalProcess) -> None:
        super().__init__("celery worker", host)
        self.log = host.log
        self._logged_before = 0

    @classmethod
    def command(cls, *args: str, **kwargs: Any) -> list[str]:
        # Alone, it need not wait a second for others to answer.
        options = ("--concurrency=2", "--without-mingle", "--without-gossip", *args)
        return [sys.executable, "-m", *super().command(*options)]

    @classmethod
    def initial_env(cls, celery_worker_cluster_config: Any, initial: Any = None) -> dict[str, str]:
        """The addresses of broker and backend as this machine sees them."""
        broker = celery_worker_cluster_config["celery_broker_cluster_config"]["host_urls"]
        backend = celery_worker_cluster_config["celery_backend_cluster_config"]["host_urls"]
        return {"CELERY_BROKER_URL": ";".join(broker), "CELERY_RESULT_BACKEND": ";".join(backend)}

    def logs(self) -> str:
        """All that it logged."""
        return self.log.read_text(errors="replace")

    def start(self, timeout: float = START_TIMEOUT) -> None:
        """Start it and wait until it takes messages.

        Raises:
            ContainerFailed: it ended, or took more than *timeout* seconds.
        """
        self._logged_before = len(self.logs()) if self.log.exists() else 0
        self.host.start()
        deadline = time.monotonic() + timeout
        while not self.ready():
            if not self.host.alive or time.monotonic() > deadline:
                why = "did not get ready" if self.host.alive else "ended"
                raise ContainerFailed(self, f"The worker {why}:\n{self.host.log_tail()}")
            time.sleep(0.05)

    def ready(self) -> bool:
        return self.ready_prompt in self.logs()[self._logged_before :]

    def kill(self, signal: str = "SIGKILL") -> None:
        """SIGKILL it with its pool and its relay; every other signal stops it in good order."""
        if signal == "SIGKILL":
            self.host.kill()
        else:
            self.host.stop(STOP_TIMEOUT)

    def restart(self, timeout: float = STOP_TIMEOUT) -> None:
        """Stop it in good order, if it runs, and start it in the same folder."""
        self.host.stop(timeout)
        self.start()


@contextmanager
def running(host: LocalProcess, timeout: float = START_TIMEOUT) -> Iterator[LocalWorker]:
    """A worker that takes messages; it has ended afterwards, also if it never got that far."""
    worker = LocalWorker(host)
    try:
        worker.start(timeout)
        yield worker
    finally:
        host.discard()
