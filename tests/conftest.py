"""What all tests have: servers, databases, and a memory that is empty."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kombu.transport import memory

pytest_plugins = [
    "tests.support.servers.fixtures",
    "tests.support.databases",
    "tests.support.brokers",
    "tests.support.service",
    "tests.support.stores",
    "tests.support.worker_slot",
]


@pytest.fixture(autouse=True)
def _empty_memory() -> Iterator[None]:
    """What one test leaves in the broker in this process's memory is not the next one's."""
    yield
    memory.Channel.queues.clear()
    memory.Transport.global_state.clear()
