"""One private broker after the other, and apps that write to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import Exchange, Queue
from kombu.transport import memory

from celery_eda import EDA
from celery_eda.brokers.base import Transport
from celery_eda.brokers.registry import transport_of
from tests.support import letters

QUEUES = [
    Queue("letters"),
    Queue("others"),
    Queue("orders", Exchange("events", type="topic"), routing_key="order.#"),
    Queue("limited", queue_arguments={"x-max-length": 3, "x-overflow": "reject-publish"}),
    Queue("quorum", queue_arguments={"x-queue-type": "quorum"}),
]


@dataclass(frozen=True)
class Broker:
    """A broker to test against.

    Attributes:
        options: what kombu's transport is told.
        serializes: whether a header that is no plain value is an error, and leaves no trace.
        ordered: whether a queue keeps its messages in the order of sending.
    """

    url: str
    options: dict[str, Any] = field(default_factory=dict)
    serializes: bool = True
    ordered: bool = True

    def empty(self, queue: str) -> list[Any]:
        """Take all messages out of *queue*."""
        return letters.empty(self.url, queue, self.options)


@pytest.fixture
def rabbitmq_broker(rabbitmq_url: str) -> Broker:
    return Broker(rabbitmq_url)


@pytest.fixture
def redis_broker(redis_url: str) -> Broker:
    return Broker(redis_url)


@pytest.fixture
def memory_broker() -> Iterator[Broker]:
    yield Broker("memory://", serializes=False)
    memory.Transport.global_state.clear()
    memory.Channel.queues.clear()


@pytest.fixture
def filesystem_broker(tmp_path: Path) -> Broker:
    folder = str(tmp_path)
    return Broker(
        "filesystem://",
        {"data_folder_in": folder, "data_folder_out": folder, "control_folder": folder},
        serializes=False,
        ordered=False,
    )


@pytest.fixture
def sqlite_broker(tmp_path: Path) -> Broker:
    return Broker(f"sqla+sqlite:///{tmp_path}/broker")


@pytest.fixture
def eda_sqlite_broker(tmp_path: Path) -> Broker:
    return Broker(f"eda+sqlite:///{tmp_path}/broker.db")


@pytest.fixture
def eda_postgresql_broker(postgresql_url: str) -> Broker:
    return Broker(f"eda+{postgresql_url}")


@pytest.fixture(
    params=[
        *("rabbitmq", "redis", "memory", "filesystem", "sqlite"),
        *("eda_sqlite", "eda_postgresql"),
    ]
)
def broker(request: pytest.FixtureRequest) -> Broker:
    """Every broker in turn."""
    found: Broker = request.getfixturevalue(f"{request.param}_broker")
    return found


def app_of(url: str, **conf: Any) -> Celery:
    """An app with the queues of these tests."""
    app = Celery("letters", broker=url, set_as_current=False)
    app.conf.update({"task_queues": QUEUES, **conf})
    return app


@pytest.fixture
def transport_to() -> Iterator[Callable[..., Transport]]:
    """Makes transports, and closes them when the test is over."""
    made: list[Transport] = []

    def make(url: str, *, timeout: float = 20, **conf: Any) -> Transport:
        app = app_of(url, **conf)
        EDA(app)  # a transport declares the queues of an extended app
        made.append(transport_of(app, timeout=timeout))
        return made[-1]

    yield make
    for transport in made:
        transport.close()


@pytest.fixture
def transport(broker: Broker, transport_to: Callable[..., Transport]) -> Transport:
    """A transport to the broker in turn."""
    return transport_to(broker.url, broker_transport_options=broker.options)
