"""Inside a transaction neither the broker nor the result backend is touched, even if both are away.

Not shown by the time it takes, but by every connection that Python opens and by every statement
that the database gets.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from celery import Celery, chain, chord, group
from celery.beat import ScheduleEntry, Scheduler
from sqlalchemy import Engine, event, select

from celery_eda import EDA
from celery_eda.errors import OutsideTransaction
from celery_eda.outbox import result_backend
from tests.faults.conftest import Road
from tests.support.databases import Database
from tests.support.servers import ports
from tests.support.servers.proxy import Proxy
from tests.support.servers.redis import Redis

BROKERS = ("amqp", "redis")
BACKENDS = ("redis", "rpc", "database", "none")
CANVAS: dict[str, Callable[[Any, Any], Any]] = {
    "delay": lambda add, total: add.delay(1, 2),
    "with every option": lambda add, total: add.apply_async(
        (1, 2), countdown=60, expires=90, queue="other", priority=3, link=add.s(3)
    ),
    "by name": lambda add, total: add.app.send_task("shop.add", (1, 2)),
    "chain": lambda add, total: (add.s(1, 2) | add.s(3)).delay(),
    "group": lambda add, total: group(add.s(n, n) for n in range(20)).delay(),
    "chord": lambda add, total: chord([add.s(1, 1), add.s(2, 2)])(total.s()),
    "chord of groups": lambda add, total: chord(
        [group(add.s(1, 1), add.s(2, 2)), group(add.s(3, 3), add.s(4, 4))]
    )(total.s()),
    "canvas of canvases": lambda add, total: chain(
        add.s(1, 1), group(add.s(2), add.s(3) | add.s(4)), total.s(), add.s(5)
    ).delay(),
}

_connects: list[Any] | None = None
#: Threads that earlier tests have left, and that may connect again at any time.
_others: set[int | None] = set()


def _hear(name: str, arguments: tuple[Any, ...]) -> None:
    connects = name in ("socket.connect", "socket.getaddrinfo")
    if connects and _connects is not None and threading.get_ident() not in _others:
        _connects.append(arguments)


sys.addaudithook(_hear)  # for good: Python has no way to remove one


@contextmanager
def connects() -> Iterator[list[Any]]:
    """Every connection that the block opens, in this thread or in one that it starts."""
    global _connects, _others
    _others = {each.ident for each in threading.enumerate()} - {threading.get_ident()}
    _connects = []
    try:
        yield _connects
    finally:
        _connects = None


@contextmanager
def statements(engine: Engine) -> Iterator[list[str]]:
    """Every statement that the database gets in the block."""
    heard: list[str] = []

    def hear(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        heard.append(statement)

    event.listen(engine, "before_cursor_execute", hear)
    yield heard
    event.remove(engine, "before_cursor_execute", hear)


@pytest.fixture(params=["closed", "black hole"])
def nowhere(request: pytest.FixtureRequest) -> Iterator[int]:
    """A port where nobody listens, or one where everything is swallowed."""
    if request.param == "closed":
        port = ports.claim()
        yield port
        ports.release(port)
    else:
        with Proxy(ports.claim()) as proxy:
            proxy.black_hole()
            yield proxy.port


def make_app(eda_engine: Engine, broker: str, backend: str | None, **settings: Any) -> Celery:
    app = Celery("shop", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(
        eda_send_after_commit=False,
        # A plain publish to nowhere shall fail soon.
        task_publish_retry=False,
        broker_connection_timeout=1,
        broker_transport_options={"socket_connect_timeout": 1, "socket_timeout": 1},
        result_backend_transport_options={"retry_policy": {"max_retries": 0, "timeout": 1}},
        redis_socket_connect_timeout=1,
        **settings,
    )
    EDA(app, engine=eda_engine)
    return app


def declare_tasks(app: Celery) -> tuple[Any, Any]:
    @app.eda.task(name="shop.add")
    def add(x: int, y: int) -> int:
        return x + y

    @app.eda.task(name="shop.total")
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    return add, total


def backend_url(backend: str, port: int, folder: Path) -> str | None:
    return {
        "redis": f"redis://127.0.0.1:{port}/1",
        "rpc": "rpc://",
        "database": f"db+sqlite:///{folder}/away/results",
        "none": None,
    }[backend]


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, nowhere: int) -> str:
    """The URL of a broker that is away."""
    return f"{request.param}://127.0.0.1:{nowhere}//"


@pytest.mark.parametrize("backend", BACKENDS)
def test_publishing_opens_no_connection_and_costs_one_insert(
    database: Database, broker: str, backend: str, nowhere: int, tmp_path: Path
) -> None:
    app = make_app(database.engine, broker, backend_url(backend, nowhere, tmp_path))
    add, total = declare_tasks(app)
    app.set_current()

    for name, publish in CANVAS.items():
        if backend in ("rpc", "none") and ("chord" in name or "canvases" in name):
            continue  # Celery has no chords there, and says so
        with (
            statements(database.engine) as executed,
            connects() as opened,
            app.eda.transaction() as session,
        ):
            session.connection()  # the database's own connection is not the subject
            result = publish(add, total)

            assert executed == [], name
            assert result.id
            session.commit()

        # Broker and backend are both there.
        assert not [each for each in opened if str(nowhere) in str(each)], name
        assert sum("INSERT INTO" in each for each in executed) == 1, executed


@pytest.mark.parametrize(
    ("guard", "name"),
    [("_defer_replies", "delay"), ("_defer_chords", "chord"), ("_defer_waiting", "group")],
)
def test_unless_it_is_deferred_publishing_connects_to_the_result_backend(
    database: Database, monkeypatch: pytest.MonkeyPatch, guard: str, name: str
) -> None:
    monkeypatch.setattr(result_backend, guard, lambda _: None)
    nowhere = ports.claim()
    app = make_app(database.engine, "memory://", f"redis://127.0.0.1:{nowhere}/1")
    tasks = declare_tasks(app)
    app.set_current()

    with connects() as opened, pytest.raises(Exception, match=r".+"), app.eda.transaction():
        CANVAS[name](*tasks)
    ports.release(nowhere)

    assert any(str(nowhere) in str(each) for each in opened)


FETCH = """
from pathlib import Path
from celery import chain, chord, group
from celery.result import result_from_tuple
from tests.faults.programs.canvas_system import add, keep

with eda.transaction():
    one = add.delay(1, 2)
    three = chain(add.s(1, 1), add.s(2), add.s(3)).delay()
    many = group(add.s(n, n) for n in range(5)).delay()
    whole = chord([group(add.s(1, 1), add.s(2, 2)), add.s(3, 3)])(keep.s(1)) if CHORDS else None
    again = result_from_tuple(many.as_tuple(), app=app)
Path(os.environ["ROAD_FOLDER"], "published").touch()
wait_for("handled", 400)

assert many.get(timeout=150) == [0, 2, 4, 6, 8]
assert again.get(timeout=150) == [0, 2, 4, 6, 8]
assert many.completed_count() == 5
assert one.get(timeout=150) == 3
assert three.get(timeout=150) == 7
assert three.parent.get(timeout=150) == 4
assert whole is None or sorted(whole.get(timeout=150)) == [2, 4, 6]
"""


@pytest.mark.parametrize(
    ("broker", "backend"), [("rabbitmq", "rpc"), ("redis", "rpc"), ("rabbitmq", "redis")]
)
def test_what_was_published_while_all_was_away_arrives_and_its_results_can_be_fetched(
    request: pytest.FixtureRequest,
    redis_server: Redis,
    postgresql_url: str,
    tmp_path: Path,
    broker: str,
    backend: str,
) -> None:
    url = request.getfixturevalue(f"{broker}_url")
    with Proxy(urlsplit(url).port or 0) as wire, Proxy(redis_server.port) as results_wire:
        road = Road(wire.through(url), postgresql_url, tmp_path)
        road.app = "tests.faults.programs.canvas_system"
        road.environment["ROAD_RESULTS"] = (
            "rpc://" if backend == "rpc" else results_wire.through(redis_server.database(203))
        )
        wire.black_hole()
        results_wire.refuse()
        with ThreadPoolExecutor() as threads:
            code = FETCH.replace("CHORDS", str(backend == "redis"))
            fetched = threads.submit(road.run, code, patience=600)
            road.until((tmp_path / "published").exists, "the commit, with everything away")
            road.until(lambda: road.waiting() >= 7, "the messages in the outbox")
            wire.heal()
            results_wire.heal()
            road.worker()
            road.relay()
            road.until(lambda: road.effects("add").total() >= 9, "the effects")
            road.settle()  # so that all results are there before anybody asks for one
            (tmp_path / "handled").touch()
            fetched.result()
        road.end()


# ── outside any transaction ─────────────────────────────────────────────────────────────────


def in_outbox(database: Database) -> list[str]:
    with database.engine.connect() as connection:
        columns = database.tables.outbox.c
        return list(connection.scalars(select(columns.task).order_by(columns.id)))


def in_memory(app: Celery) -> int:
    """Messages that were sent to the broker."""
    with app.connection_for_read() as connection:
        return int(connection.SimpleQueue("celery").qsize())


@pytest.mark.parametrize(
    ("outside", "stored", "sent"),
    [(None, ["shop.add"], 1), ("store", ["shop.add", "shop.plain"], 0), ("send", [], 2)],
)
def test_outside_any_transaction_a_setting_decides(
    database: Database, outside: str | None, stored: list[str], sent: int
) -> None:
    app = make_app(database.engine, "memory://", None, eda_outside=outside)
    add, _ = declare_tasks(app)

    @app.task(name="shop.plain", shared=False)
    def plain() -> None:
        pass

    add.delay(1, 2)
    plain.delay()

    assert in_outbox(database) == stored
    assert in_memory(app) == sent


def test_outside_any_transaction_publishing_can_be_forbidden(database: Database) -> None:
    app = make_app(database.engine, "memory://", None, eda_outside="raise")
    add, _ = declare_tasks(app)

    with pytest.raises(OutsideTransaction, match="add was published"):
        add.delay(1, 2)
    with pytest.raises(OutsideTransaction, match="elsewhere"):
        app.send_task("elsewhere")
    with app.eda.transaction():
        app.send_task("elsewhere")

    assert in_outbox(database) == ["elsewhere"]
    assert in_memory(app) == 0


@pytest.mark.parametrize("backend", ["redis", "rpc"])
@pytest.mark.parametrize("name", ["delay", "by name", "beat"])
def test_what_is_stored_outside_any_transaction_opens_no_connection_either(
    database: Database, broker: str, backend: str, nowhere: int, tmp_path: Path, name: str
) -> None:
    app = make_app(database.engine, broker, backend_url(backend, nowhere, tmp_path))
    add, total = declare_tasks(app)
    entry = ScheduleEntry("nightly", "shop.add", schedule=1, args=(1, 2), app=app)
    beat = Scheduler(app, lazy=True)
    ways = {**CANVAS, "beat": lambda *_: beat.apply_async(entry, advance=False)}
    database.engine.connect().close()

    with connects() as opened:
        ways[name](add, total)

    assert [each for each in opened if str(nowhere) in str(each)] == []
    assert in_outbox(database) == ["shop.add"]
