"""The system under fault: one Celery app, in processes that may be told to die.

It is loaded by producers (``tests.faults.programs.place_orders``), workers and relays; everything
it needs to know is in its environment. ``ROAD_FAULTS`` holds ``step:action:file`` items: the first
process that reaches *step* creates *file* and then dies (``kill``) or stops (``freeze``). A number
behind them is how often a process has to reach *step* for that.
``ROAD_SETTINGS`` holds Celery options as JSON; ``ROAD_ENGINE`` arguments for an engine of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any

from celery import Celery
from celery.exceptions import Reject, SoftTimeLimitExceeded
from sqlalchemy import create_engine, func, insert, select, text, update
from sqlalchemy.orm import Session, sessionmaker

from celery_eda import EDA, RetryPolicy
from celery_eda.brokers.redis import consume
from celery_eda.core import checkpoints
from celery_eda.inbox.refusals import Refusals
from tests.faults.programs import removed_guards as mutations
from tests.faults.programs.tables import accounts, effects

app = Celery("road", broker=os.environ["ROAD_BROKER"], backend=os.environ.get("ROAD_RESULTS"))
app.conf.update(
    eda_database_url=os.environ["ROAD_DATABASE"],
    eda_send_after_commit=os.environ.get("ROAD_SEND_AFTER_COMMIT") == "1",
    eda_embedded_relay=os.environ.get("ROAD_EMBEDDED_RELAY") == "1",
    eda_claim_timeout=float(os.environ.get("ROAD_CLAIM_TIMEOUT", "3")),
    eda_publish_timeout=float(os.environ.get("ROAD_PUBLISH_TIMEOUT", "2")),
    eda_retry_delay=0.1,
    eda_max_deliveries=int(os.environ.get("ROAD_MAX_DELIVERIES", "5")),
    task_default_queue=os.environ.get("ROAD_QUEUE", "road"),
    task_default_queue_type=os.environ.get("ROAD_QUEUE_TYPE", "classic"),
    worker_prefetch_multiplier=4,
    broker_connection_retry_on_startup=True,
    broker_connection_timeout=2,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    task_publish_retry_policy={"max_retries": 1, "interval_start": 0.1},
    result_backend_transport_options={"retry_policy": {"timeout": 1.0}},
)
if os.environ["ROAD_BROKER"].startswith("redis"):
    app.conf.broker_transport_options = {
        "visibility_timeout": 2,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }
app.conf.update(json.loads(os.environ.get("ROAD_SETTINGS", "{}")))
consume.LOW_PRIORITY_POLL = float(os.environ.get("ROAD_GLANCE", consume.LOW_PRIORITY_POLL))
own_engine = os.environ.get("ROAD_ENGINE")
eda = EDA(
    app,
    engine=create_engine(os.environ["ROAD_DATABASE"], **json.loads(own_engine))
    if own_engine
    else None,
)


def record(name: str, number: int) -> None:
    """Take effect: one row, in the transaction of the message in progress."""
    eda.session.execute(insert(effects).values(name=name, number=number))


@eda.task(name="road.charge")
def charge(session: Session, number: int) -> int:
    session.execute(insert(effects).values(name="charge", number=number))
    return number


@eda.task(name="road.trade", key="account")
def trade(session: Session, account: int, number: int) -> int:
    """The trades of an account take effect in their order."""
    session.execute(insert(effects).values(name=f"account {account}", number=number))
    return number


def write_down(request: Any) -> None:
    """Append what a task sees of its message to a file."""
    seen = {"id": request.id, **request.delivery_info, **(request.headers or {})}
    with open(os.path.join(os.environ["ROAD_FOLDER"], "requests"), "a") as file:
        file.write(json.dumps(seen) + "\n")


@eda.task(name="road.stand", key="account")
def stand(session: Session, account: int, number: int, how: str = "", seconds: float = 0.0) -> int:
    """Take effect in the order of the account; the first of each fails while the file is there."""
    write_down(stand.request)
    session.execute(insert(effects).values(name=f"account {account}", number=number))
    if number == 1 and os.path.exists(os.path.join(os.environ["ROAD_FOLDER"], "barred")):
        raise ValueError("barred")
    if how == "kill always" or (how == "kill" and _first_time(f"stand{account}.{number}")):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds)
    return number


@eda.task(name="road.quote")
def quote(session: Session, number: int, seconds: float = 0.0) -> int:
    """Replies with twice the number."""
    session.execute(insert(effects).values(name="quote", number=number))
    time.sleep(seconds)
    return 2 * number


@eda.task(name="road.slow")
def slow(session: Session, number: int, seconds: float) -> int:
    session.execute(insert(effects).values(name="slow", number=number))
    time.sleep(seconds)
    return number


@eda.task(name="road.stall")
def stall(session: Session, number: int, seconds: float, always: bool = False) -> int:
    """Computes for so long after it wrote, the first time or every time."""
    session.execute(insert(effects).values(name="stall", number=number))
    if always or _first_time(f"stall{number}"):
        time.sleep(seconds)
    return number


@eda.task(name="road.patient")
def patient(session: Session, number: int, seconds: float) -> int:
    """As :func:`slow`, but content with less when its soft limit comes."""
    session.execute(insert(effects).values(name="patient", number=number))
    with suppress(SoftTimeLimitExceeded):
        time.sleep(seconds)
    return number


@eda.task(name="road.hang", time_limit=2)
def hang(session: Session, number: int) -> int:
    """Overruns its hard limit the first time."""
    session.execute(insert(effects).values(name="hang", number=number))
    if _first_time(f"hang{number}"):
        time.sleep(600)
    return number


@eda.task(name="road.crash")
def crash(session: Session, number: int, how: str) -> int:
    """Takes its process down, the first time or every time."""
    session.execute(insert(effects).values(name="crash", number=number))
    if how.endswith("always") or _first_time(f"crash{number}"):
        if how.startswith("exit"):
            os._exit(1)
        if how.startswith("sys.exit"):
            sys.exit(3)
        os.kill(os.getpid(), signal.SIGSEGV if how.startswith("segfault") else signal.SIGKILL)
    return number


@eda.task(name="road.fail")
def fail(session: Session, number: int) -> None:
    """Fails for good after it wrote."""
    session.execute(insert(effects).values(name="fail", number=number))
    raise ValueError(f"no {number}")


@eda.task(name="road.flaky", bind=True, max_retries=5)
def flaky(self, session: Session, number: int) -> int:  # type: ignore[no-untyped-def]
    """Fails twice after it wrote, then works; says so and what it published in its last try."""
    session.execute(insert(effects).values(name="flaky", number=number))
    charge.delay(number)
    if self.request.retries < 2:
        raise self.retry(countdown=0.2)
    return number


@eda.task(
    name="road.unsteady",
    bind=True,
    policy=RetryPolicy(attempts=4, first=0.2, longest=0.2, on=(ConnectionError,)),
)
def unsteady(self, session: Session, number: int, failures: int) -> int:  # type: ignore[no-untyped-def]
    """Fails so often after it wrote, then works; its policy has it tried again."""
    session.execute(insert(effects).values(name="unsteady", number=number))
    charge.delay(number)
    if self.request.retries < failures:
        raise ConnectionError(f"not yet {self.request.retries}")
    return number


@eda.task(name="road.swap", bind=True)
def swap(self, session: Session, number: int) -> int:  # type: ignore[no-untyped-def]
    session.execute(insert(effects).values(name="swap", number=number))
    raise self.replace(add.s(number, 1000))


@eda.task(name="road.add")
def add(session: Session, left: int, right: int) -> int:
    session.execute(insert(effects).values(name="add", number=left))
    return left + right


@eda.task(name="road.visit")
def visit(session: Session, number: int, route: list[int], lock_timeout: str = "") -> int:
    """Visits accounts in the order of its *route*, the first time together with a rival."""
    session.execute(insert(effects).values(name="visit", number=number))
    if lock_timeout:
        session.execute(text(lock_timeout))
    for account in route:
        session.execute(
            update(accounts).where(accounts.c.id == account).values(visits=accounts.c.visits + 1)
        )
        if len(route) > 1 and _first_time(f"visited{account}"):
            wait_for(f"visited{3 - account}", seconds=5)
    return number


@eda.task(name="road.tally")
def tally(session: Session, after: float = 0.02) -> int:
    """Reads how many came before, and writes it down: only a serial order gives all numbers."""
    before = session.scalar(select(func.count()).where(effects.c.name == "tally"))
    time.sleep(after)
    session.execute(insert(effects).values(name="tally", number=before))
    return int(before or 0)


@eda.task(name="road.total")
def total(session: Session, numbers: list[int]) -> int:
    session.execute(insert(effects).values(name="total", number=sum(numbers)))
    return sum(numbers)


@eda.task(name="road.mourn")
def mourn(session: Session, task_id: str) -> None:
    """An errback of the old style, published with the id of the task that failed."""
    session.execute(insert(effects).values(name="mourn", number=0))


if os.environ.get("ROAD_ASYNC", "1") == "1":

    @eda.task(name="road.later")
    async def later(session: Session, number: int) -> int:
        session.execute(insert(effects).values(name="later", number=number))
        await asyncio.sleep(0.01)
        charge.delay(number)
        return number


@eda.task(name="road.where")
def where(session: Session) -> None:
    """Writes down which connection of the database serves which process."""
    identify = (
        func.pg_backend_pid if eda.databases.engine.name == "postgresql" else func.connection_id
    )
    name = f"process {os.getpid()}"
    session.execute(insert(effects).values(name=name, number=select(identify()).scalar_subquery()))
    time.sleep(0.05)


@eda.task(name="road.refuse")
def refuse(session: Session, number: int, for_good: bool = False) -> int:
    session.execute(insert(effects).values(name="refuse", number=number))
    if for_good or _first_time(f"refuse{number}"):
        raise Reject(requeue=not for_good)
    return number


SessionLocal = sessionmaker(create_engine(os.environ["ROAD_DATABASE"]))
eda.attach(SessionLocal)


@eda.task(name="road.legacy")
def legacy(number: int) -> None:
    """Existing code: opens its own session, commits it, and publishes."""
    with SessionLocal() as session:
        session.execute(insert(effects).values(name="legacy", number=number))
        charge.delay(number)
        session.commit()


@app.task(name="legacy.plain")
def plain(number: int) -> None:
    """An ordinary task, reliable where ``eda_tasks`` says so."""
    record("plain", number)


@app.task(name="legacy.note")
def note(number: int) -> None:
    """An ordinary task with a transaction of its own."""
    with SessionLocal() as session:
        session.execute(insert(effects).values(name="note", number=number))
        session.commit()


def _first_time(name: str) -> bool:
    folder = os.environ["ROAD_FOLDER"]
    try:
        os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def wait_for(name: str, seconds: float) -> None:
    """Wait until somebody has made the file *name*, but not for ever."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.path.exists(os.path.join(os.environ["ROAD_FOLDER"], name)):
            return
        time.sleep(0.01)


def _arm_faults() -> None:
    for fault in filter(None, os.environ.get("ROAD_FAULTS", "").split(",")):
        step, action, path, *nth = fault.split(":")
        if step == "refusal.kept":
            _strike_before_the_ack(action, path)
            continue
        checkpoints.arm(step, partial(_strike_at, count(1), int(*nth or (1,)), action, path))


def _strike_before_the_ack(action: str, path: str) -> None:
    """Strike when a dead letter of the inspection is committed, before its message goes."""
    keep = Refusals.dead_letter

    def keep_and_strike(*arguments: Any) -> bool:
        fresh = keep(*arguments)
        _strike(action, path)
        return fresh

    Refusals.dead_letter = keep_and_strike  # type: ignore[method-assign]


def _strike_at(times: Iterator[int], nth: int, action: str, path: str) -> None:
    if next(times) >= nth:
        _strike(action, path)


def _strike(action: str, path: str) -> None:
    """Die or stop, once in all processes: whoever creates the file is the one."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return
    os.write(handle, str(os.getpid()).encode())
    os.close(handle)
    os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)


_arm_faults()
if mutation := os.environ.get("ROAD_MUTATION"):
    mutations.MUTATIONS[mutation]()
