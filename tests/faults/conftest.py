"""A whole system of processes for each test: producers, relays, workers, a broker, a database."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, create_engine, func, select

from celery_eda.databases import upgrade
from celery_eda.databases.registry import dialect_of
from celery_eda.databases.tables import Tables
from tests.faults.programs import process_nursery as nursery
from tests.faults.programs.process_nursery import Born
from tests.faults.programs.tables import effects, metadata, orders
from tests.support import PROJECT
from tests.support.servers.base import Server
from tests.support.servers.proxy import Proxy

#: Seconds until a test gives up; on a busy machine a worker may take twenty to start.
PATIENCE = 150.0
#: Broker and database of each road; a fixture of that name gives the URL.
ROADS = {
    "rabbitmq-postgresql": ("rabbitmq_url", "postgresql_url"),
    "redis-mariadb": ("redis_url", "mariadb_url"),
    "redis-sqlite": ("redis_url", "sqlite_url"),
    "eda-sqlite": ("eda_sqlite_url", "sqlite_url"),
    "eda-postgresql": ("eda_postgresql_url", "postgresql_url"),
}
#: Those with a pooler before PostgreSQL; only a few tests are about them.
POOLED = {
    "rabbitmq-pgbouncer": ("rabbitmq_url", "pgbouncer_url"),
    "eda-pgbouncer": ("eda_pgbouncer_url", "pgbouncer_url"),
}
#: Those on which a message waits in the database itself, so that no relay has to send it.
SHORT = ("eda-sqlite", "eda-postgresql")


def first_of(*roads: str) -> pytest.MarkDecorator:
    """On the first of *roads* in every run, on the others in soak."""
    others = (pytest.param(each, marks=pytest.mark.soak) for each in roads[1:])
    return pytest.mark.parametrize("road", [roads[0], *others], indirect=True)


on_servers = pytest.mark.parametrize(
    "road",
    [
        *("rabbitmq-postgresql", "redis-mariadb"),
        pytest.param("redis-sqlite", marks=pytest.mark.soak),
    ],
    indirect=True,
)


by_relay = pytest.mark.parametrize(
    "road", [each for each in ROADS if each not in SHORT], indirect=True
)
on_short_roads = pytest.mark.parametrize("road", SHORT, indirect=True)


def expect_hits(number: int, what: str) -> None:
    """Show how often it could have gone wrong: a zero proves nothing if that was never."""
    print(f"{number} {what}")  # noqa: T201  # to be seen with `pytest -rP`
    assert number > 0, f"no {what}"


class Process:
    """One process of the system, and what it logged."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.arguments = arguments
        self.environment = environment
        self.log = log
        self.start()

    def start(self) -> None:
        arguments = ["-m", *self.arguments]
        if "gevent" in arguments:  # which has to come before all that it patches
            self.popen: Born | subprocess.Popen[bytes] = self._spawned(arguments)
        else:
            self.popen = Born(arguments, self.environment, self.log)

    def _spawned(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *arguments],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def signal(self, number: int) -> None:
        """Signal this process, not its children."""
        self.popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL it with everything it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def wait(self, timeout: float = PATIENCE) -> int:
        return self.popen.wait(timeout)

    def wait_briefly(self) -> int | None:
        """Its exit code; None if it is still there after a second."""
        try:
            return self.popen.wait(1.0)
        except subprocess.TimeoutExpired:
            return None


class Road:
    """The processes of one system and the database they leave their effects in.

    Attributes:
        app: the module with the Celery app of its relays and workers.
    """

    app = "tests.faults.programs.order_system"

    def __init__(self, broker: str, database: str, folder: Path) -> None:
        self.folder = folder
        self.broker = broker
        self.database = database
        self.processes: list[Process] = []
        self._errors = 0
        # One connection, to ask again and again; tried before it is used, since servers are killed.
        self.engine: Engine = create_engine(database, pool_size=1, pool_pre_ping=True)
        self.tables = Tables.on()
        dialect_of(self.engine.url, claim_timeout=60).configure_engine(self.engine, 60)
        upgrade.upgrade(self.engine, self.tables)
        metadata.create_all(self.engine)
        self.environment = {
            **os.environ,
            "ROAD_BROKER": broker,
            "ROAD_DATABASE": database,
            "ROAD_FOLDER": str(folder),
            "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]),
            "PYTHONUNBUFFERED": "1",
            # What a killed process leaves in it goes with the folder.
            "TMPDIR": str(folder),
        }

    # ── processes ───────────────────────────────────────────────────────────────────────────

    def place(self, first: int, last: int) -> None:
        """Place the orders *first* to *last*; every third is undone."""
        assert self.producer(first, last).wait() == 0, self.logs()

    def producer(
        self, first: int, last: int, *, fault: str | None = None, **environment: str
    ) -> Process:
        return self._run(
            ["tests.faults.programs.place_orders", str(first), str(last)], fault, environment
        )

    def relay(self, *, fault: str | None = None, **environment: str) -> Process:
        return self._run(["celery", "-A", self.app, "eda", "relay"], fault, environment)

    def worker(
        self, *options: str, pool: str = "prefork", fault: str | None = None, **environment: str
    ) -> Process:
        return self._run(
            [
                *("celery", "-A", self.app, "worker", "-c2", "-P", pool),
                *("--without-gossip", "--without-mingle", "-l", "INFO", *options),
            ],
            fault,
            environment,
        )

    def run(self, code: str, patience: float = PATIENCE, **environment: str) -> None:
        """Run *code* in a process of the system, to its end."""
        self._errors += 1
        errors = self.folder / f"errors-{self._errors}"
        program = "from tests.faults.programs.order_system import *\n" + code
        done = Born(["-c", program], {**self.environment, **environment}, errors)
        assert done.wait(patience) == 0, errors.read_text()

    def fault(self, step: str, action: str = "kill", nth: int = 1) -> str:
        """The first process that reaches *step*, for the *nth* time, dies or stops there."""
        return f"{step}:{action}:{self.struck(step)}:{nth}"

    def struck(self, step: str) -> Path:
        """The file that is there, with the pid in it, once the fault at *step* has struck."""
        return self.folder / f"{step}.struck"

    def _run(
        self, arguments: list[str], fault: str | None, environment: dict[str, str] | None = None
    ) -> Process:
        log = self.folder / f"{len(self.processes)}-{arguments[-1].replace('/', '_')}.log"
        everything = {**self.environment, "ROAD_FAULTS": fault or "", **(environment or {})}
        process = Process(arguments, everything, log)
        self.processes.append(process)
        return process

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        self.engine.dispose()

    def logs(self) -> str:
        return "\n".join(
            f"--- {each.log.name}\n{each.log.read_text(errors='replace')[-6000:]}"
            for each in self.processes
        )

    def logged(self, words: str) -> int:
        """How often *words* are in the logs of all processes."""
        return sum(each.log.read_text(errors="replace").count(words) for each in self.processes)

    # ── what happened ───────────────────────────────────────────────────────────────────────

    def committed(self) -> Counter[int]:
        """The orders that were committed."""
        return Counter(self._all(select(orders.c.number)))

    def effects(self, name: str = "charge") -> Counter[int]:
        """How often each number took effect."""
        return Counter(self._all(select(effects.c.number).where(effects.c.name == name)))

    def waiting(self) -> int:
        """Messages in the outbox."""
        return int(self._all(select(func.count()).select_from(self.tables.outbox))[0])

    def queued(self) -> int:
        """Messages in the queues of a database that is the broker."""
        return int(self._all(select(func.count()).select_from(self.tables.queue))[0])

    def last_error(self) -> str | None:
        """Why the broker refused the first row of the outbox, if it did."""
        why = self._all(select(self.tables.outbox.c.last_error).order_by("id"))
        return why[0] if why else None

    def parked(self) -> int:
        """Messages that wait for their predecessor."""
        return int(self._all(select(func.count()).select_from(self.tables.parked))[0])

    def dead(self) -> list[tuple[str, str]]:
        """Task and reason of each dead letter."""
        columns = self.tables.dead_letters.c
        with self.engine.connect() as connection:
            rows = connection.execute(select(columns.task, columns.reason)).all()
        return [(row.task, row.reason) for row in rows]

    def ends(self, message_id: str) -> list[str]:
        """How each attempt at a message ended, in the order of the revisions."""
        columns = self.tables.inbox.c
        attempts = select(columns.outcome).where(columns.message_id == UUID(message_id))
        return self._all(attempts.order_by(columns.revision))

    def until(self, condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> None:
        """Wait until *condition* is true; fail with every process's log otherwise."""
        deadline = time.monotonic() + patience
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"not in {patience} s: {what}\n{self.logs()}")
            time.sleep(0.1)

    def settle(self, seconds: float = 1.0) -> None:
        """Let whatever is still on the wire arrive: a second effect would show up now."""
        self.until(lambda: self.waiting() == 0, "an empty outbox")
        self.pause(seconds, "nothing tells that a copy will not come")

    def pause(self, seconds: float, why: str) -> None:
        """Let time pass, where time itself is what the test is about."""
        time.sleep(seconds)

    def _all(self, query: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.scalars(query))


@pytest.fixture(scope="session", autouse=True)
def _nursery() -> Iterator[None]:
    """Ended together with the tests."""
    yield
    nursery.close()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'road.db'}"


@pytest.fixture
def eda_sqlite_url(sqlite_url: str) -> str:
    return f"eda+{sqlite_url}"


@pytest.fixture
def eda_postgresql_url(postgresql_url: str) -> str:
    return f"eda+{postgresql_url}"


@pytest.fixture
def eda_pgbouncer_url(pgbouncer_url: str) -> str:
    return f"eda+{pgbouncer_url}"


@pytest.fixture(
    params=[
        *("rabbitmq-postgresql", "redis-mariadb", "eda-sqlite"),
        *(
            pytest.param(each, marks=pytest.mark.soak)
            for each in ("redis-sqlite", "eda-postgresql")
        ),
    ]
)
def road(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Road]:
    """A system on every pair of broker and database; the last two in soak."""
    names = {**ROADS, **POOLED}[request.param]
    broker, database = (request.getfixturevalue(name) for name in names)
    road = Road(broker, database, tmp_path)
    yield road
    road.end()


@pytest.fixture
def broker(request: pytest.FixtureRequest, road: Road) -> Server:
    """The road's broker, to be killed, frozen and restarted."""
    kind = "redis_server" if road.broker.startswith("redis") else "rabbitmq"
    server: Server = request.getfixturevalue(kind)
    return server


@pytest.fixture
def database(request: pytest.FixtureRequest, road: Road) -> Server:
    """The road's database, to be killed, frozen and restarted; not for SQLite."""
    kind = "postgresql" if road.database.startswith("postgresql") else "mariadb"
    server: Server = request.getfixturevalue(kind)
    return server


@pytest.fixture
def broker_wire(road: Road, broker: Server) -> Iterator[Proxy]:
    """The wire between the processes of the road and its broker."""
    with Proxy(broker.port) as wire:
        road.environment["ROAD_BROKER"] = wire.through(road.broker)
        yield wire
        road.end()


@pytest.fixture
def database_wire(road: Road, database: Server) -> Iterator[Proxy]:
    """The wire between the processes of the road and their database; the test has its own."""
    with Proxy(database.port) as wire:
        road.environment["ROAD_DATABASE"] = wire.through(road.database)
        yield wire
        road.end()
