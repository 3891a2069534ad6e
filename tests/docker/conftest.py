"""``celery_setup`` of pytest-celery on this machine's own processes, with EDA on both sides.

Where a Docker engine answers, broker and backend are the containers of pytest-celery instead; no
machine of ours had one, so that is untried. ``DOCKER_HOST=none`` keeps to processes there too.
The worker is a process everywhere: it runs this very code on the test's database.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery import Celery
from pytest_celery import (
    ALL_CELERY_BACKENDS,
    ALL_CELERY_BROKERS,
    CeleryTestBackend,
    CeleryTestBroker,
    CeleryTestSetup,
    RabbitMQTestBroker,
)
from sqlalchemy import select

from celery_eda import EDA
from celery_eda.databases import upgrade
from tests.docker import shop
from tests.docker.nodes import LocalRabbitMQ, LocalRedis, LocalServer, LocalWorker, running
from tests.support.servers import docker
from tests.support.servers.hosts import LocalProcess

# ── parameters ──────────────────────────────────────────────────────────────────────────────

# pytest-celery keeps them in sets, whose order depends on the hash seed of the process; the
# processes of pytest-xdist have to collect the same tests in the same order.


@pytest.fixture(params=sorted(ALL_CELERY_BROKERS))
def celery_broker(request: pytest.FixtureRequest) -> Iterator[CeleryTestBroker]:
    broker: CeleryTestBroker = request.getfixturevalue(request.param)
    yield broker
    broker.teardown()


@pytest.fixture(params=sorted(ALL_CELERY_BACKENDS))
def celery_backend(request: pytest.FixtureRequest) -> Iterator[CeleryTestBackend]:
    backend: CeleryTestBackend = request.getfixturevalue(request.param)
    yield backend
    backend.teardown()


# ── containers ──────────────────────────────────────────────────────────────────────────────


def _container(name: str, kind: type[LocalServer], server: str, url: str) -> Any:
    """A fixture in the place of pytest-celery's of the same *name*."""

    @pytest.fixture(name=name)
    def container(request: pytest.FixtureRequest) -> Any:
        if docker.answers():
            return request.getfixturevalue(name)
        return kind(request.getfixturevalue(server), request.getfixturevalue(url))

    return container


default_redis_broker = _container("default_redis_broker", LocalRedis, "redis_server", "redis_url")
default_redis_backend = _container("default_redis_backend", LocalRedis, "redis_server", "redis_url")
default_rabbitmq_broker = _container(
    "default_rabbitmq_broker", LocalRabbitMQ, "rabbitmq", "rabbitmq_url"
)


@pytest.fixture
def default_worker_container(
    default_worker_command: list[str],
    default_worker_env: Mapping[str, str],
    default_worker_initial_content: Mapping[str, bytes],
    tmp_path: Path,
) -> Iterator[LocalWorker]:
    """A running worker, in a folder with the files that a container would get."""
    folder = tmp_path / "worker"
    for name, content in default_worker_initial_content.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    host = LocalProcess(default_worker_command, folder, environment=default_worker_env)
    with running(host) as worker:
        yield worker


@pytest.fixture
def default_worker_container_cls() -> type[LocalWorker]:
    return LocalWorker


# ── the service ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def default_worker_app_module() -> ModuleType:
    return shop


@pytest.fixture
def database_url(
    request: pytest.FixtureRequest, celery_broker: CeleryTestBroker, tmp_path: Path
) -> str:
    """PostgreSQL beside RabbitMQ, SQLite beside Redis."""
    if isinstance(celery_broker, RabbitMQTestBroker):
        url: str = request.getfixturevalue("postgresql_url")
        return url
    return f"sqlite:///{tmp_path / 'service.db'}"


@pytest.fixture
def celery_setup_app(
    celery_setup_app: Celery, celery_broker: CeleryTestBroker, database_url: str
) -> Iterator[Celery]:
    """The test's own app: a producer of the service, configured as its worker will be."""
    # Changes, which pytest-celery copies into the worker's file; `celery_setup_config` it does not.
    celery_setup_app.conf.update(
        eda_database_url=database_url,
        # The relay beside the worker sends: a thread of the test would outlive it.
        eda_send_after_commit=False,
        eda_retry_delay=0.1,
        broker_connection_retry_on_startup=True,
    )
    if not isinstance(celery_broker, RabbitMQTestBroker):
        celery_setup_app.conf.broker_transport_options = {
            "visibility_timeout": 2,
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
        }
    eda = EDA(celery_setup_app)
    upgrade.upgrade(eda.databases.engine, eda.databases.tables)
    shop.metadata.create_all(eda.databases.engine)
    yield celery_setup_app
    eda.databases.engine.dispose()
    celery_setup_app.close()


@pytest.fixture
def eda(celery_setup: CeleryTestSetup) -> EDA:
    """The producer's side of the service."""
    eda: EDA = celery_setup.app.eda
    return eda


@pytest.fixture
def effects(eda: EDA) -> Callable[[], Counter[tuple[str, int]]]:
    """How often each task took effect with each number."""

    def count() -> Counter[tuple[str, int]]:
        with eda.databases.engine.connect() as connection:
            rows = connection.execute(select(shop.effects.c.task, shop.effects.c.number))
            return Counter((row.task, row.number) for row in rows)

    return count
