"""The service that the worker runs: a Celery app with EDA, a table, a few reliable tasks.

pytest-celery copies this file into the worker's folder as ``app.py`` and writes the modules with
its own tasks, the name of the app and the test's configuration into the three marked lines.
"""

from __future__ import annotations

import time
from pathlib import Path

from celery import Celery
from celery.utils.log import get_task_logger
from sqlalchemy import Column, Integer, MetaData, String, Table, insert
from sqlalchemy.orm import Session

from celery_eda import EDA

imports = None  # marked

app = Celery("celery_test_app")  # marked
config = None  # marked

if config:
    app.config_from_object(config)
eda = EDA(app)
log = get_task_logger(__name__)
metadata = MetaData()
#: What took effect; nothing here forbids that it is there twice.
effects = Table(
    "effects",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("task", String(40), nullable=False),
    Column("number", Integer, nullable=False),
)


@eda.task(name="shop.charge")
def charge(session: Session, number: int) -> int:
    session.execute(insert(effects).values(task="charge", number=number))
    return number


@eda.task(name="shop.add")
def add(session: Session, left: int, right: int) -> int:
    session.execute(insert(effects).values(task="add", number=left + right))
    return left + right


@eda.task(name="shop.total")
def total(session: Session, numbers: list[int]) -> int:
    session.execute(insert(effects).values(task="total", number=sum(numbers)))
    return sum(numbers)


@eda.task(name="shop.hold")
def hold(session: Session, number: int) -> int:
    """Takes effect, but does not get as far as its commit the first time."""
    session.execute(insert(effects).values(task="hold", number=number))
    if not Path("held").exists():
        Path("held").touch()
        log.warning("holding %s", number)
        time.sleep(600)
    return number
