"""Celery's own integration suite, with every task reliable and every message in the outbox."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import create_engine

from celery_eda.databases import Tables, upgrade
from tests.suites.sources import Outcomes, Suite
from tests.support.servers.redis import Redis

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3 * 3600)]

#: Tests that differ from plain Celery's by design, as docs/differs-from-celery.md says.
INHERENT = {
    r"test_group_chains\..*[\[-]1\]": "protocol 1 is refused",
    r"test_inspect\.test_Inspect\.test_(active|query_task)": "messages are acknowledged late",
    r"test_inspect\.test_Inspect\.test_scheduled": "delays wait in the outbox",
    r"test_tasks\..*\.test_asyncresult_(forget|get)_cancels_subscription": (
        "a call does not subscribe to its result"
    ),
    r"test_tasks\..*\.test_task_sent_event_respects_publish_retry_limit": (
        "the event is sent with the message, by another connection"
    ),
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    folder = tmp_path_factory.mktemp("celery")
    return Suite.of("celery", folder, "cryptography", "django", "python-dateutil", "tblib")


@pytest.fixture
def database(postgresql_url: str) -> str:
    engine = create_engine(postgresql_url)
    upgrade.upgrade(engine, Tables.on())
    engine.dispose()
    return postgresql_url


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_no_test_of_celery_fails_that_passes_without_the_package(
    suite: Suite,
    broker: str,
    redis_server: Redis,
    database: str,
    request: pytest.FixtureRequest,
) -> None:
    backend = redis_server.database(0)
    rabbitmq = request.getfixturevalue("rabbitmq") if broker == "rabbitmq" else None
    environment = {
        "TEST_BROKER": rabbitmq.vhost("suite") if rabbitmq else backend,
        "TEST_BACKEND": backend,
        "REDIS_HOST": "127.0.0.1",
        "REDIS_PORT": str(redis_server.port),
        "WORKER_LOGLEVEL": "INFO",  # some tests look for the worker's logs
        "SUITE_DATABASE": database,
    }

    def clean() -> None:
        """Empty broker and backend."""
        redis_server.database(0)
        if rabbitmq:
            rabbitmq.vhost("suite")

    def run(plugin: str | None) -> Outcomes:
        return suite.run(["t/integration"], environment=environment, plugin=plugin, clean=clean)

    plain = run(None)
    ours = run("tests.suites.reliable_apps")

    assert len(ours.passed) > 300
    unexpected = [name for name in sorted(ours.failed & plain.passed) if not is_inherent(name)]
    assert unexpected == [], ours.output[-100_000:]


def is_inherent(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in INHERENT)
