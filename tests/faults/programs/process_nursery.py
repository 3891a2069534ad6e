"""Processes that are born with everything imported: to import it takes a process two seconds.

``python -m tests.faults.programs.process_nursery SOCKET`` imports what the system under fault
imports, makes no app and no connection, and then forks a process for each request. A process lives
and dies as if the shell had started it: a session of its own, its own environment, output, signals
and ending.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tests.support import PROJECT

MODULES = (
    "celery.app.control",
    "celery.backends.database",
    "celery.backends.redis",
    "celery.backends.rpc",
    "celery.bin.celery",
    "celery.concurrency.prefork",
    "celery.concurrency.solo",
    "celery.concurrency.thread",
    "celery.apps.worker",
    "celery.worker.consumer",
    "celery_eda.ops.cli",
    "celery_eda.outbox.embedded",
    "celery_eda.app.worker",
    "celery_eda.databases.mysql",
    "celery_eda.databases.postgresql",
    "celery_eda.databases.sqlite",
    "celery_eda.brokers.database.publish",
    "celery_eda.brokers.database.consume",
    "celery_eda.brokers.rabbitmq.publish",
    "celery_eda.brokers.rabbitmq.replies",
    "celery_eda.brokers.redis.publish",
    "celery_eda.brokers.redis.consume",
    "kombu.transport.pyamqp",
    "psycopg",
    "pymysql",
    "sqlalchemy.dialects.mysql.pymysql",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "tests.faults.programs.removed_guards",
    "tests.faults.programs.tables",
)


class Born:
    """One process, as ``subprocess.Popen`` would show it."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: dict[str, str],
        output: Path,
        errors: Path | None = None,
    ) -> None:
        """Start ``python`` with *arguments*: ``-m MODULE …`` or ``-c CODE``."""
        self.returncode: int | None = None
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(_nursery()[0])
        request = [list(arguments), environment, str(output), str(errors or output)]
        self._line.sendall(json.dumps(request).encode() + b"\n")
        self.pid = int(self._heard())

    def poll(self) -> int | None:
        """Its exit code; None while it lives."""
        return self.returncode if self._ended(0) else None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it lives longer.
        """
        if not self._ended(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> bool:
        if self.returncode is None and select.select([self._line], [], [], timeout)[0]:
            self.returncode = int(self._heard())
            self._line.close()
        return self.returncode is not None

    def _heard(self) -> str:
        heard = b""
        while not heard.endswith(b"\n"):
            more = self._line.recv(1)  # no more: its ending may already stand behind its birth
            if not more:
                raise ChildProcessError("the nursery is gone")
            heard += more
        return heard.decode()


def close() -> None:
    """End the nursery, if there is one."""
    if _nursery.cache_info().currsize:
        _, process = _nursery()
        _nursery.cache_clear()
        process.communicate()


@cache
def _nursery() -> tuple[str, subprocess.Popen[bytes]]:
    """A nursery and its socket; it ends when this process does, at the latest."""
    path = os.path.join(tempfile.mkdtemp(prefix="nursery-"), "socket")
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, path],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stdout.readline() == b"open\n", "the nursery has not opened"
    return path, process


# What follows runs in the nursery.


def serve(path: str) -> Any:
    """Fork a process for each request; returns in that process, with what it is to run."""
    for each in MODULES:
        importlib.import_module(each)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the tests, who then let go of us
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        door.listen()
        print("open")  # noqa: T201
        born: dict[int, socket.socket] = {}
        bell, ringer = os.pipe()
        os.set_blocking(ringer, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(ringer, warn_on_full_buffer=False)
        while True:
            calling, _, _ = select.select([door, bell, sys.stdin], [], [])
            if bell in calling:
                os.read(bell, 4096)
                bury(born)
            if door in calling:
                line = door.accept()[0]
                request = json.loads(line.makefile("rb").readline())
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    os.close(bell)
                    os.close(ringer)
                    for other in born.values():
                        other.close()
                    return begin(line, *request)
                born[pid] = line
            if sys.stdin in calling:
                Path(path).unlink()
                Path(path).parent.rmdir()
                raise SystemExit


def bury(born: dict[int, socket.socket]) -> None:
    """Tell the exit code of each process that has ended."""
    while born:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with born.pop(pid) as line, suppress(BrokenPipeError):  # nobody may want to know
            line.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def begin(
    line: socket.socket,
    arguments: list[str],
    environment: dict[str, str],
    output: str,
    errors: str,
) -> list[str]:
    """Become a process of its own; returns what it is to run."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # it may have been looked up before
    for number, path in ((0, os.devnull), (1, output), (2, errors)):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    line.sendall(b"%d\n" % os.getpid())
    line.close()
    return arguments


if __name__ == "__main__":
    kind, what, *rest = serve(sys.argv[1])
    sys.argv = [what, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})
