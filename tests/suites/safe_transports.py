"""A plugin of pytest for kombu's own suite: its connections use the transports of celery_eda."""

from __future__ import annotations

from kombu.transport import TRANSPORT_ALIASES

import celery_eda  # noqa: F401  # registers the transport of databases

TRANSPORT_ALIASES.update(
    pyamqp="celery_eda.brokers.rabbitmq.consume:Transport",
    redis="celery_eda.brokers.redis.consume:Transport",
)
