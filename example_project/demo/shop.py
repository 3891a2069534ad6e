"""The shop as processes: workers and relays for every service, and customers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from uuid import uuid4

from celery import Celery

from example_project.demo import customers, processes
from example_project.demo.processes import Failed, Process, python
from example_project.settings import SERVICES

WORKERS = ("order-1", "payment-1", "kitchen-1", "kitchen-2", "delivery-1")
RELAYS = tuple(f"{service}-relay" for service in SERVICES)
CUSTOMERS = 3
PATIENCE = 40.0


class Shop:
    """A shop with its logs, and its databases unless the environment names others, in *folder*.

    Attributes:
        staff: the workers and relays by name; restarted when they exit.
        customers: processes that exit by themselves.
    """

    def __init__(self, broker: str, folder: Path) -> None:
        self.broker = broker
        self.folder = folder
        # The broker may be shared, so the queues get unique names.
        self.name = f"shop-{uuid4().hex[:8]}"
        self.databases = {
            service: os.environ.get(_variable(service)) or f"sqlite:///{folder / service}.db"
            for service in SERVICES
        }
        self._environment = {
            **os.environ,
            **{_variable(service): url for service, url in self.databases.items()},
            "SHOP_BROKER": broker,
            "SHOP_NAME": self.name,
            "PYTHONUNBUFFERED": "1",
            # Temporary files of killed processes are deleted with the folder.
            "TMPDIR": str(folder),
        }
        self._errands: list[Process] = []
        self.staff: dict[str, Process] = {}
        self.customers: list[Process] = []

    def make_tables(self) -> None:
        """Create the tables of celery_eda and of the shop in each database."""
        self._run_all(
            {
                f"{service}-upgrade": python("celery", "-A", _app(service), "eda", "db", "upgrade")
                for service in SERVICES
            }
        )
        self._run_all({"opening": python("example_project.opening")})

    def open(self) -> None:
        """Start the staff and wait until all are ready."""
        for name in WORKERS:
            service = name.split("-")[0]
            command = python("celery", "-A", _app(service), "worker", "-c2", "-l", "INFO")
            options = ("-n", self.node(name), "-Q", f"{self.name}.{service}")
            quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat")
            self.staff[name] = self._start(name, [*command, *options, *quiet])
        for name in RELAYS:
            service = name.split("-")[0]
            self.staff[name] = self._start(
                name, python("celery", "-A", _app(service), "eda", "relay")
            )
        _wait_for((self.staff[name] for name in WORKERS), " ready.")
        _wait_for((self.staff[name] for name in RELAYS), "Relay is running")

    def let_in(self, orders: int, seconds: float, seed: int) -> None:
        """Start the customers, who place *orders* orders together; wait until they are ready."""
        for number in range(CUSTOMERS):
            share = len(range(number, orders, CUSTOMERS))
            diary = str(self.folder / f"{number}.diary")
            arguments = (str(share), str(seconds), f"{seed}-{number}", diary)
            command = python("example_project.demo.customers", *arguments)
            self.customers.append(self._start(f"customer-{number}", command))
        _wait_for(self.customers, customers.READY)

    def is_trading(self) -> bool:
        """True while customers are ordering.

        Raises:
            Failed: one of them exited with an error.
        """
        for each in self.customers:
            if not each.alive and each.wait(0):
                raise Failed(f"{each.name} left with an error:\n{each.tail()}")
        return any(each.alive for each in self.customers)

    def supervise(self) -> Iterator[str]:
        """Restart the staff that exited; returns their names."""
        for each in self.staff.values():
            if not each.alive:
                each.start()
                yield each.name

    def node(self, worker: str) -> str:
        """The node name of *worker* in Celery's remote control."""
        return f"{worker}@{self.name}"

    def told(self) -> customers.Told:
        """The customers' results so far."""
        return customers.read(self.folder)

    def close(self) -> None:
        """Stop all processes."""
        processes.end([*self._errands, *self.customers, *self.staff.values()])

    def close_and_remove_queues(self) -> None:
        """Stop all processes, and delete the queues on a broker that is not private."""
        self.close()
        with Celery(broker=self.broker).connection_for_write() as connection:
            for service in SERVICES:
                connection.default_channel.queue_delete(f"{self.name}.{service}")
                connection.default_channel.exchange_delete(f"{self.name}.{service}")

    def _start(self, name: str, command: list[str]) -> Process:
        return Process(name, command, self._environment, self.folder / f"{name}.log")

    def _run_all(self, commands: dict[str, list[str]]) -> None:
        """Run *commands* concurrently until all have finished."""
        self._errands = [self._start(name, command) for name, command in commands.items()]
        for each in self._errands:
            if each.wait(PATIENCE):
                raise Failed(f"{each.name} failed:\n{each.tail()}")


def _wait_for(started: Iterable[Process], words: str) -> None:
    """Wait until the log of each process contains *words*.

    Raises:
        Failed: a process exited, or its log lacks the words after the timeout.
    """
    deadline = time.monotonic() + PATIENCE
    for each in started:
        while not each.has_said(words):
            if time.monotonic() > deadline or not (each.alive or each.has_said(words)):
                raise Failed(f"{each.name} did not start:\n{each.tail()}")
            time.sleep(0.05)


def _app(service: str) -> str:
    return f"example_project.{service}"


def _variable(service: str) -> str:
    return f"SHOP_{service.upper()}_DATABASE"
