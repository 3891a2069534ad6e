"""The services of an example as processes on a private broker, for one story."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from example_project.demo import processes
from example_project.demo.broker import PrivateBroker
from example_project.demo.processes import Failed, Process, python

#: Seconds before a step of the story times out.
PATIENCE = 60.0


class Town:
    """The services of one package on a private broker, each with a database of its own.

    Args:
        folder: has the databases and logs.
        ends: stops the processes.
        package: the package with a module for each service.

    Attributes:
        workers: the worker of each service.
    """

    def __init__(self, folder: Path, ends: ExitStack, package: str) -> None:
        broker = PrivateBroker(folder / "broker")
        ends.callback(processes.end, [broker.process])
        broker.wait_until_ready()
        self.folder = folder
        self.broker = broker.url
        self.package = package
        self.workers: dict[str, Process] = {}
        self._ends = ends
        os.environ.update(SHOP_BROKER=broker.url, SHOP_NAME="town")

    def open(self, services: Sequence[str], *options: str) -> None:
        """Create the databases of *services*, and start a worker with *options* for each."""
        for name in services:
            url = f"sqlite:///{self.folder / name}.db"
            os.environ.setdefault(f"SHOP_{name.upper()}_DATABASE", url)
        for name in services:
            app = f"{self.package}.{name}"
            self.command(name, "db", "upgrade")
            self.finish(f"{name}-opening", "-c", f"import {app} as it; it.open_for_business()")
            words = ("worker", "-c2", "-l", "INFO", "-n", f"{name}@%h", *options)
            log = self.folder / f"{name}.log"
            worker = Process(name, python("celery", "-A", app, *words), dict(os.environ), log)
            self._ends.callback(processes.end, [worker])
            self.workers[name] = worker

    def run(self, name: str, *command: str) -> Process:
        """Start a process that logs to the file *name*."""
        return Process(name, [sys.executable, *command], dict(os.environ), self.folder / name)

    def finish(self, name: str, *command: str) -> None:
        """Run a process until it exits.

        Raises:
            Failed: the process exited with an error.
        """
        process = self.run(name, *command)
        if process.wait(PATIENCE):
            raise Failed(f"{name} failed:\n{process.tail()}")

    def command(self, service: str, *words: str) -> None:
        """Run ``celery -A … eda`` with these *words*.

        Raises:
            Failed: the command exited with an error.
        """
        app = f"{self.package}.{service}"
        self.finish(f"{service}-{words[0]}", "-m", "celery", "-A", app, "eda", *words)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait until *condition* is true.

    Raises:
        Failed: the condition is still false after the timeout.
    """
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"not in {PATIENCE:.0f} s: {what}")
        time.sleep(0.1)
