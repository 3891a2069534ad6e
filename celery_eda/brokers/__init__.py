"""Brokers: publish to them, consume from them, and exchange replies over them."""

from __future__ import annotations

from celery_eda.brokers import own_queues
from celery_eda.brokers.auxiliary_consumer import AuxiliaryConsumer
from celery_eda.brokers.base import (
    EnvelopeTemplate,
    KeepsMalformed,
    Pipelined,
    PublishResult,
    ReplyConsumer,
    Sendable,
    Transport,
    Verdict,
)
from celery_eda.brokers.connection import SafeConnection
from celery_eda.brokers.database.publish import DirectEnqueue
from celery_eda.brokers.rabbitmq import dead_letter_exchange
from celery_eda.brokers.registry import (
    BROKERS,
    declare_reply_queue,
    envelope_template_of,
    is_database,
)
from celery_eda.brokers.wiring import Brokers

__all__ = [
    "BROKERS",
    "AuxiliaryConsumer",
    "Brokers",
    "DirectEnqueue",
    "EnvelopeTemplate",
    "KeepsMalformed",
    "Pipelined",
    "PublishResult",
    "ReplyConsumer",
    "SafeConnection",
    "Sendable",
    "Transport",
    "Verdict",
    "dead_letter_exchange",
    "declare_reply_queue",
    "envelope_template_of",
    "is_database",
    "own_queues",
]
