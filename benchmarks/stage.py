"""The private servers and processes of a run, all of which end with it."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import psutil
from sqlalchemy import create_engine
from typing_extensions import Self

from benchmarks.contestant import Contestant
from celery_eda.databases import upgrade
from celery_eda.databases.tables import Tables
from tests.faults.programs.tables import metadata
from tests.support import PROJECT
from tests.support.servers.base import Server
from tests.support.servers.hosts import LocalProcess
from tests.support.servers.postgresql import PostgreSQL
from tests.support.servers.rabbitmq import RabbitMQ
from tests.support.servers.redis import DATABASES, Redis

AnyServer = TypeVar("AnyServer", bound=Server)

#: Seconds within which a worker has to answer for the first time.
PATIENCE = 60.0


class Stage:
    """Starts each server at its first use, and gives every case a database or broker of its own."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    @cached_property
    def folder(self) -> Path:
        """The temporary folder of the servers and processes."""
        folder = Path(tempfile.mkdtemp(prefix="celery-eda-benchmarks-"))
        folder.chmod(0o755)  # PostgreSQL refuses to run as root
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder

    @cached_property
    def postgresql(self) -> PostgreSQL:
        return self._running(PostgreSQL)

    @cached_property
    def rabbitmq(self) -> RabbitMQ:
        return self._running(RabbitMQ)

    @cached_property
    def redis(self) -> Redis:
        return self._running(Redis)

    def database(self) -> str:
        """The URL of a new database with the tables of a service and of its business."""
        name = f"bench{next(self._numbers)}"
        url = self.postgresql.database(name)
        self._stack.callback(self.postgresql.drop, name)
        engine = create_engine(url)
        upgrade.upgrade(engine, Tables.on())
        metadata.create_all(engine)
        engine.dispose()
        return url

    def broker(self, kind: str) -> str:
        """The URL of an empty broker of the *kind* ``rabbitmq`` or ``redis``."""
        number = next(self._numbers)
        if kind == "redis":
            return self.redis.database(number % DATABASES)
        return self.rabbitmq.vhost(f"bench{number}")

    @contextmanager
    def cast(self) -> Iterator[Cast]:
        """Processes that end with the block."""
        with ExitStack() as stack:
            yield Cast(self.folder, stack, self._numbers)

    def _running(self, kind: type[AnyServer]) -> AnyServer:
        return self._stack.enter_context(kind.find(self.folder))


class Cast:
    """The processes of one goal."""

    def __init__(self, folder: Path, stack: ExitStack, numbers: Iterator[int]) -> None:
        self._folder = folder
        self._stack = stack
        self._numbers = numbers

    def contestant(self, module: str, **environment: str) -> Contestant:
        """A process of ``benchmarks.contestants.<module>`` that serves calls."""
        log = self._folder / f"{next(self._numbers)}-{module}.log"
        return self._stack.enter_context(Contestant(module, {**_paths(), **environment}, log))

    def worker(
        self, module: str, *options: str, pool: str = "prefork", **environment: str
    ) -> Worker:
        """A Celery worker of that module's app, with two slots."""
        # Two workers of one name would share their remote control queue.
        name = f"bench{next(self._numbers)}@%h"
        words = ("worker", "-n", name, "-c2", "-P", pool, "-l", "WARNING", *options)
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat")
        return self.celery(module, *words, *quiet, **environment)

    def celery(self, module: str, *words: str, **environment: str) -> Worker:
        """``celery -A <module's app> <words>``."""
        app = f"benchmarks.contestants.{module}"
        return self.program("celery", "-A", app, *words, **environment)

    def program(self, *words: str, **environment: str) -> Worker:
        """``python -m <words>``."""
        folder = self._folder / f"{next(self._numbers)}-{words[0]}"
        folder.mkdir()
        command = [sys.executable, "-m", *words]
        host = LocalProcess(command, folder, environment={**_paths(), **environment})
        host.start()
        self._stack.callback(host.kill)
        return Worker(host)


class Worker:
    """A process and its children, whose CPU time can be read."""

    def __init__(self, host: LocalProcess) -> None:
        self.host = host

    def cpu(self) -> float:
        """Seconds of CPU of all its processes so far."""
        total = 0.0
        for pid in self.host.pids:
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def memory(self) -> int:
        """Private memory of its processes, in bytes."""
        return sum(psutil.Process(pid).memory_info().rss for pid in self.host.pids)


def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> None:
    """Wait until *condition* is true.

    Raises:
        TimeoutError: the condition is false after *patience* seconds.
    """
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {patience:g} s: {what}")
        time.sleep(0.02)


def _paths() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONHASHSEED": "0"}
