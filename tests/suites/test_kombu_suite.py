"""Kombu's own suite of transports, on the transports of celery_eda."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.suites.sources import Outcomes, Suite
from tests.support.servers.rabbitmq import RabbitMQ
from tests.support.servers.redis import Redis

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite.of("kombu", tmp_path)


@pytest.mark.parametrize(
    ("file", "server", "variables"),
    [
        ("test_py_amqp.py", "rabbitmq", ("RABBITMQ_HOST", "RABBITMQ_5672_TCP")),
        ("test_redis.py", "redis_server", ("REDIS_HOST", "REDIS_6379_TCP")),
    ],
)
def test_no_test_of_a_broker_fails_that_passes_with_kombus_own_transport(
    suite: Suite,
    file: str,
    server: str,
    variables: tuple[str, str],
    request: pytest.FixtureRequest,
) -> None:
    broker: RabbitMQ | Redis = request.getfixturevalue(server)
    environment = dict(zip(variables, ("127.0.0.1", str(broker.port)), strict=True))

    def clean() -> None:
        """Empty what the suite uses."""
        if isinstance(broker, RabbitMQ):
            broker.vhost("/")
        else:
            broker.database(0)

    def run(plugin: str | None) -> Outcomes:
        return suite.run(
            [f"t/integration/{file}"],
            environment=environment,
            options=["--override-ini", "python_classes=test_*"],
            plugin=plugin,
            clean=clean,
        )

    plain = run(None)
    ours = run("tests.suites.safe_transports")

    assert len(ours.passed) > 30
    assert sorted(ours.failed & plain.passed) == [], ours.output[-50_000:]


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_database_passes_kombus_tests_of_a_broker(
    suite: Suite, tmp_path: Path, database: str, request: pytest.FixtureRequest
) -> None:
    shutil.copy(
        Path(__file__).with_name("database_transport.py"),
        suite.folder / "t/integration/test_database.py",
    )
    urls = {
        "sqlite": (f"sqlite:///{tmp_path}/broker.db", f"sqlite:///{tmp_path}/no/folder/broker.db"),
        "postgresql": ("", "postgresql+psycopg://postgres@127.0.0.1:9/nobody"),
    }
    url, nobody = urls[database]
    ours: Outcomes = suite.run(
        ["t/integration/test_database.py"],
        environment={
            "SUITE_BROKER": f"eda+{url or request.getfixturevalue('postgresql_url')}",
            "SUITE_NOBODY": f"eda+{nobody}",
        },
    )

    assert len(ours.passed) > 25
    assert sorted(ours.failed) == [], ours.output[-50_000:]
