"""Systems that cannot fork, such as Windows: import, publish, and run a worker of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import PROJECT

#: Takes away what Python does not have on Windows, after other libraries have chosen by platform.
LIKE_WINDOWS = """
import os, select, signal, sys
import alembic.command, sqlalchemy.ext.asyncio
import celery.bin.celery, celery.contrib.testing.worker, celery.worker.consumer
import kombu.transport.pyamqp, kombu.transport.redis
from celery import Celery

for name in ("fork", "forkpty", "register_at_fork", "mkfifo", "setsid", "wait4"):
    os.__dict__.pop(name, None)
for name in ("poll", "epoll"):
    select.__dict__.pop(name, None)
for name in ("SIGKILL", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGSTOP"):
    signal.__dict__.pop(name, None)
for name in ("fcntl", "grp", "pwd", "resource", "syslog", "termios"):
    sys.modules[name] = None
"""
IMPORT_EVERYTHING = """
import importlib, pkgutil
import celery_eda

for module in pkgutil.walk_packages(celery_eda.__path__, "celery_eda."):
    if not module.name.endswith("migrations.env"):
        importlib.import_module(module.name)
"""
RUN = """
from celery.contrib.testing.worker import start_worker
from sqlalchemy import text
from celery_eda import EDA
from celery_eda.databases import upgrade

app = Celery("shop", broker="memory://", backend="cache+memory://")
app.conf.update(eda_database_url="sqlite:///" + sys.argv[1])
eda = EDA(app)

@eda.task(name="shop.charge")
def charge(session, number):
    session.execute(text("INSERT INTO charges VALUES (:number)"), {"number": number})
    return number

upgrade.upgrade(eda.databases.engine, eda.databases.tables)
with eda.databases.engine.begin() as connection:
    connection.execute(text("CREATE TABLE charges (number INTEGER)"))
with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=60):
    with eda.transaction():
        result = charge.delay(7)
    print("result", result.get(timeout=60))
with eda.databases.engine.connect() as connection:
    print("effects", connection.execute(text("SELECT number FROM charges")).scalars().all())
"""
REFUSE = """
from celery_eda import EDA

app = Celery("shop", broker="eda+sqlite:///" + sys.argv[1])
app.conf.update(eda_database_url="sqlite:///" + sys.argv[1])
EDA(app)
app.connection_for_write().connect()
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIKE_WINDOWS + code, str(folder / "shop.db")]
    return subprocess.run(
        command, cwd=PROJECT, check=False, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("code", "printed"),
    [(IMPORT_EVERYTHING, ""), (RUN, "result 7\neffects [7]\n")],
    ids=["import", "run"],
)
def test_a_system_that_cannot_fork_can_use_everything_else(
    tmp_path: Path, code: str, printed: str
) -> None:
    done = run(code, tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(printed)


def test_sqlite_as_the_broker_is_refused_there_with_the_remedy(tmp_path: Path) -> None:
    done = run(REFUSE, tmp_path)

    assert done.returncode == 1
    assert "SQLite cannot be the broker on this system" in done.stderr
