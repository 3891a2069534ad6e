"""The connections that a worker takes its messages over, so that none is lost or stops it."""

from __future__ import annotations

from typing import Any

from kombu import Connection
from kombu.transport import pyamqp, redis

from celery_eda.transports import rabbitmq_taking, redis_taking

_OURS = {
    redis.Transport: redis_taking.Transport,
    pyamqp.Transport: rabbitmq_taking.Transport,
    pyamqp.SSLTransport: rabbitmq_taking.SSLTransport,
}


class SafeConnection(Connection):
    """Kombu's connection; to some brokers, one that loses nothing when its worker dies."""

    def get_transport_cls(self) -> Any:
        transport = super().get_transport_cls()
        return _OURS.get(transport, transport)
