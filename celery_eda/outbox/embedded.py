"""A relay beside the pool of a Celery worker, so that small systems need no process for it.

The relay is a process of its own beside a pool that forks, and a thread beside any other pool.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from typing import Any

from celery import bootsteps

from celery_eda.core.forks import CAN_FORK
from celery_eda.core.service import service_of
from celery_eda.outbox.relay import Relay
from celery_eda.outbox.wiring import Outbox

log = logging.getLogger(__name__)

#: Seconds that a worker waits at most for its relay to end.
STOP_PATIENCE = 10.0
#: Seconds between two checks that the relay's process is alive.
REVIVAL = 2.0
#: Seconds between two checks that the worker is alive, made in the relay's process.
PARENT_CHECK = 0.5


class EmbeddedRelay(bootsteps.StartStopStep):
    """Runs a relay beside the pool, if ``eda_embedded_relay`` is set.

    A pool that forks must not have a relay in a thread of the main process: the forked child would
    inherit the locks of that thread in whatever state they are.
    """

    requires = ("celery_eda.app.worker:Guard", "celery.worker.components:Timer")

    def __init__(self, worker: Any, **options: Any) -> None:
        self.enabled = service_of(worker.app).settings.embedded_relay
        self.runner: RelayProcess | RelayThread | None = None

    def start(self, worker: Any) -> None:
        outbox = service_of(worker.app).wing(Outbox)
        if CAN_FORK and worker.pool_cls.__module__.endswith("prefork"):
            self.runner = process = RelayProcess(outbox)
            worker.timer.call_repeatedly(REVIVAL, process.revive)
        else:
            self.runner = RelayThread(outbox)
        self.runner.start()

    def stop(self, worker: Any) -> None:
        if self.runner:
            self.runner.stop()

    terminate = stop


class RelayThread:
    """A relay in a thread of this process."""

    def __init__(self, outbox: Outbox) -> None:
        self.relay = outbox.relay()
        self.thread = threading.Thread(target=self.relay.run, name="celery_eda relay", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """End after the batches in progress."""
        self.relay.stop()
        self.thread.join(STOP_PATIENCE)


class RelayProcess:
    """A relay in a process of its own, which ends when this one ends, in whatever way."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.stopping = False

    def start(self) -> None:
        self.process = multiprocessing.get_context("fork").Process(
            target=run_until_orphaned,
            args=(self.outbox, os.getpid()),
            name="celery_eda relay",
            daemon=True,
        )
        self.process.start()
        log.info("a relay runs beside this worker, as process %s", self.process.pid)

    def revive(self) -> None:
        """Start another process if the relay's was killed."""
        if not self.stopping and not self.process.is_alive():
            log.error(
                "the relay's process ended with exit code %s; another one is started",
                self.process.exitcode,
            )
            self.start()

    def stop(self) -> None:
        """End after the batches in progress; kill the process if that takes too long."""
        self.stopping = True
        self.process.terminate()
        self.process.join(STOP_PATIENCE)
        self.process.kill()


def run_until_orphaned(outbox: Outbox, parent: int) -> None:
    """Run a relay until this process gets SIGTERM or SIGQUIT, or *parent* has ended."""
    relay = outbox.relay()
    for number in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, lambda *_: relay.stop())
    # Signals of the terminal reach this process too. The worker decides when the relay ends.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_stop_if_orphaned, args=(relay, parent), daemon=True).start()
    relay.run()


def _stop_if_orphaned(relay: Relay, parent: int) -> None:
    while os.getppid() == parent:
        if relay.stopping.wait(PARENT_CHECK):
            return
    relay.stop()
