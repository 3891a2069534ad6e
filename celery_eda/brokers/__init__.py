"""Brokers: publish to them, consume from them, and exchange replies over them."""

from __future__ import annotations

from celery_eda.brokers.connection import SafeConnection
from celery_eda.brokers.registry import (
    BROKERS,
    Connector,
    declare_reply_queue,
    direct_enqueue_of,
    envelope_encoder_of,
    envelope_template_of,
    is_database,
    reply_consumer_of,
    transport_of,
)

__all__ = [
    "BROKERS",
    "Connector",
    "SafeConnection",
    "declare_reply_queue",
    "direct_enqueue_of",
    "envelope_encoder_of",
    "envelope_template_of",
    "is_database",
    "reply_consumer_of",
    "transport_of",
]
