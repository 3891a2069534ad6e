"""What is done to the shop while it trades: SIGKILLs, and one restart of whatever is in the middle.

Nobody is warned. Who was killed is started again, as a supervisor would; a pool child is replaced
by its own worker.
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

#: Seconds in which a worker shall say whom it has in its pool.
PATIENCE = 8.0


@dataclass
class Faults:
    """Strikes *shop* and, if there is one of ours, its *broker*; *chance* chooses whom.

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
        """When to call what; each call strikes, and says in a line what it did.

        The moments are parts of the time that the customers order in.
        """
        strikes: list[tuple[float, Callable[[], str]]] = [
            (0.12, self.kill_worker),
            (0.22, self.kill_pool_child),
            (0.32, self.kill_relay),
            # If the broker is away, all new orders are in the outbox of this relay.
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
        """Kill a worker's main process, its pool with it."""
        return self._replace(self.chance.choice(WORKERS), "worker")

    def kill_everybody(self) -> str:
        """Kill all workers and relays at once: nobody is left who has a database open."""
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
        """Kill a process of a worker's pool, in the middle of a task if there is one."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if not (pool := self._busy_children() or self._children()):
                continue
            node, pid, task = self.chance.choice(pool)
            with suppress(ProcessLookupError):  # it has ended since its worker told of it
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
        """Start the broker on the same port, with what it had on disk."""
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
        """Node, process id and task of every pool child with a task in hand."""
        active = self._ask("active")
        return [
            (node, each["worker_pid"], each["name"]) for node in active for each in active[node]
        ]

    def _children(self) -> list[tuple[str, int, str]]:
        """Node and process id of every pool child."""
        stats = self._ask("stats")
        return [
            (node, pid, "nothing") for node in stats for pid in stats[node]["pool"]["processes"]
        ]

    def _ask(self, question: str) -> dict[str, Any]:
        """What each worker answers to a question of Celery's remote control, by node."""
        workers = [self.shop.node(name) for name in WORKERS]
        app = Celery(broker=self.shop.broker)
        # A connection of its own: Celery's pool may still hold one to the broker that was killed.
        with app.connection_for_write() as connection:
            inspect = app.control.inspect(
                workers, timeout=1.0, limit=len(workers), connection=connection
            )
            return getattr(inspect, question)() or {}
