"""A Redis Cluster is refused, because kombu's keys cannot be on several servers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from celery_eda.brokers import SafeConnection
from celery_eda.brokers.base import Transport
from celery_eda.errors import ConfigurationError
from tests.support.letters import letters


def test_a_worker_refuses_a_node_of_a_cluster(redis_cluster_url: str) -> None:
    with (
        SafeConnection(redis_cluster_url) as connection,
        pytest.raises(ConfigurationError, match="Redis Cluster"),
    ):
        connection.channel()


def test_a_relay_refuses_a_node_of_a_cluster(
    redis_cluster_url: str, transport_to: Callable[..., Transport]
) -> None:
    with pytest.raises(ConfigurationError, match="Redis Cluster"):
        transport_to(redis_cluster_url).publish(letters(1))
