"""What a Celery worker gets: a check before it starts, and a relay beside its pool."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from typing import Any

from celery import bootsteps

from celery_eda.errors import UnsafeSetting
from celery_eda.relay import Relay
from celery_eda.task import ReliableTask, is_asynchronous

log = logging.getLogger(__name__)

#: Pools that run greenlets.
GREEN_POOLS = ("gevent", "eventlet")
#: Seconds that a relay beside the worker may take to end.
STOP_PATIENCE = 10.0
#: Seconds between two looks whether it is still there.
REVIVAL = 2.0


class Guard(bootsteps.Step):
    """Refuses to start a worker that could not keep the promise."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        eda = worker.app.eda
        pool = worker.pool_cls.__module__.rpartition(".")[2]
        if why := eda.dialect.refused_pools.get(pool):
            raise UnsafeSetting(f"The pool {pool} cannot be used with this database: {why}.")
        eda.make_reliable(worker.app)
        if pool in GREEN_POOLS and (names := _asynchronous(worker.app.tasks.values())):
            raise UnsafeSetting(
                f"The pool {pool} cannot run `async def` tasks ({', '.join(names)}): its greenlets "
                "share one thread, which can run one event loop at a time. "
                "Use prefork, threads or solo."
            )
        eda.check()
        eda.note_subscriptions()


class EmbeddedRelay(bootsteps.StartStopStep):
    """Runs a relay beside the pool: a process beside processes, else a thread.

    A thread of the main process is no company for a pool that forks: the child would inherit its
    locks in whatever state they are.
    """

    requires = ("celery_eda.worker:Guard", "celery.worker.components:Timer")

    def __init__(self, worker: Any, **options: Any) -> None:
        self.enabled = worker.app.eda.settings.embedded_relay
        self.runner: Any = None

    def start(self, worker: Any) -> None:
        if worker.pool_cls.__module__.endswith("prefork"):
            self.runner = RelayProcess(worker.app.eda)
            worker.timer.call_repeatedly(REVIVAL, self.runner.revive)
        else:
            self.runner = RelayThread(worker.app.eda)
        self.runner.start()

    def stop(self, worker: Any) -> None:
        if self.runner:
            self.runner.stop()

    terminate = stop


class RelayThread:
    """A relay in a thread of this process."""

    def __init__(self, eda: Any) -> None:
        self.relay: Relay = eda.relay()
        self.thread = threading.Thread(target=self.relay.run, name="celery_eda relay", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """End after the round in progress."""
        self.relay.stop()
        self.thread.join(STOP_PATIENCE)


class RelayProcess:
    """A relay in a process of its own, which ends with this one however that ends."""

    def __init__(self, eda: Any) -> None:
        self.eda = eda
        self.stopping = False

    def start(self) -> None:
        self.process = multiprocessing.get_context("fork").Process(
            target=run_beside,
            args=(self.eda, os.getpid()),
            name="celery_eda relay",
            daemon=True,
        )
        self.process.start()
        log.info("a relay runs beside this worker, as process %s", self.process.pid)

    def revive(self) -> None:
        """Start another one if it was killed."""
        if not self.stopping and not self.process.is_alive():
            log.error("the relay ended with %s, starting another", self.process.exitcode)
            self.start()

    def stop(self) -> None:
        """End after the round in progress; at once if that takes too long."""
        self.stopping = True
        self.process.terminate()
        self.process.join(STOP_PATIENCE)
        self.process.kill()


def _asynchronous(tasks: Iterable[Any]) -> list[str]:
    return sorted(
        task.name for task in tasks if isinstance(task, ReliableTask) and is_asynchronous(task.run)
    )


def run_beside(eda: Any, parent: int) -> None:
    """Run a relay until this process is told to end, or *parent* is gone."""
    relay: Relay = eda.relay()
    for number in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, lambda *_: relay.stop())
    # Those of the terminal reach this process too; it ends when the worker says so.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_stop_without, args=(relay, parent), daemon=True).start()
    relay.run()


def _stop_without(relay: Relay, parent: int) -> None:
    while os.getppid() == parent:
        if relay.stopping.wait(0.5):
            return
    relay.stop()
