"""Faults injected while the shop is open: SIGKILLs, and one restart of the broker.

Killed processes are started again, as a supervisor would do; a worker replaces its pool children
itself.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from celery import Celery

from example_project.demo.broker import PrivateBroker
from example_project.demo.shop import RELAYS, WORKERS, Shop

#: Seconds within which a worker has to list its pool children.
PATIENCE = 8.0


@dataclass
class Faults:
    """Injects faults into *shop* and its private *broker*, if any; *chance* chooses the victims.

    Attributes:
        kills: processes killed so far, the broker included.
        broker_restarts: how often the broker was killed and started again.
    """

    shop: Shop
    broker: PrivateBroker | None
    chance: random.Random
    kills: int = 0
    broker_restarts: int = 0

    def plan(self) -> list[tuple[float, Callable[[], str]]]:
        """Pairs (time, fault); each fault injects itself and returns a line about it.

        Times are fractions of the time in which the customers order.
        """
        strikes: list[tuple[float, Callable[[], str]]] = [
            (0.12, self.kill_worker),
            (0.22, self.kill_pool_child),
            (0.32, self.kill_relay),
            # While the broker is down, all new orders are in the outbox of this relay.
            (0.46, self.kill_relay_of_the_counter),
            (0.65, self.kill_pool_child),
            (0.75, self.kill_worker),
            (0.82, self.kill_relay),
            (0.90, self.kill_pool_child),
        ]
        if self.broker:
            strikes += [(0.40, self.kill_broker), (0.50, self.start_broker)]
        else:
            strikes += [(0.40, self.kill_everybody)]
        return sorted(strikes, key=lambda strike: strike[0])

    def kill_worker(self) -> str:
        """Kill a worker's main process and its pool."""
        return self._replace(self.chance.choice(WORKERS), "worker")

    def kill_everybody(self) -> str:
        """Kill all workers and relays at once, so that no process has a database open."""
        staff = [*WORKERS, *RELAYS]
        for name in staff:
            self.shop.staff[name].kill()
        for name in staff:
            self.shop.staff[name].start()
        self.kills += len(staff)
        return f"SIGKILL all {len(staff)} workers and relays; started again"

    def kill_relay(self) -> str:
        """Kill a relay."""
        return self._replace(self.chance.choice(RELAYS), "relay")

    def kill_relay_of_the_counter(self) -> str:
        """Kill the relay that sends the customers' orders."""
        return self._replace("order-relay", "relay")

    def kill_pool_child(self) -> str:
        """Kill a pool child of a worker, preferably one that runs a task."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if not (pool := self._busy_children() or self._children()):
                continue
            node, pid, task = self.chance.choice(pool)
            with suppress(ProcessLookupError):  # the child has exited since its worker listed it
                os.kill(pid, signal.SIGKILL)
                self.kills += 1
                return f"SIGKILL pool child {pid} of {node.split('@')[0]}, busy with {task}"
        return "no pool child killed: no worker answered"

    def kill_broker(self) -> str:
        """Kill the broker."""
        assert self.broker, "only a private broker may be killed"
        self.broker.process.kill()
        self.kills += 1
        return "SIGKILL broker; the counter stays open"

    def start_broker(self) -> str:
        """Restart the broker on the same port with its data on disk."""
        assert self.broker, "only a private broker was killed"
        self.broker.process.start()
        self.broker.wait_until_ready()
        self.broker_restarts += 1
        return "broker started again: same port, same data"

    def _replace(self, name: str, kind: str) -> str:
        process = self.shop.staff[name]
        pid = process.pid
        process.kill()
        process.start()
        self.kills += 1
        return f"SIGKILL {kind} {name} ({pid}); started again"

    def _busy_children(self) -> list[tuple[str, int, str]]:
        """Triples (node, process id, task) of all pool children that run a task."""
        active = self._ask("active")
        return [
            (node, each["worker_pid"], each["name"]) for node in active for each in active[node]
        ]

    def _children(self) -> list[tuple[str, int, str]]:
        """Pairs (node, process id) of all pool children."""
        stats = self._ask("stats")
        return [
            (node, pid, "nothing") for node in stats for pid in stats[node]["pool"]["processes"]
        ]

    def _ask(self, question: str) -> dict[str, Any]:
        """The replies of all workers to a remote control command, by node."""
        workers = [self.shop.node(name) for name in WORKERS]
        app = Celery(broker=self.shop.broker)
        # A new connection, since Celery's pool may still have one to the killed broker.
        with app.connection_for_write() as connection:
            inspect = app.control.inspect(
                workers, timeout=1.0, limit=len(workers), connection=connection
            )
            return getattr(inspect, question)() or {}
