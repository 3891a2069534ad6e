"""Reliable, event-driven Celery: transactional outbox, idempotent inbox, late acknowledgement."""

from celery_eda.app import EDA
from celery_eda.core.event import Event
from celery_eda.core.retry import RetryPolicy
from celery_eda.databases import Tables
from celery_eda.dead_letters import Failure, RepairDecision
from celery_eda.errors import EDAError
from celery_eda.events import Projection
from celery_eda.requests import Replies, Reply
from celery_eda.sagas import Saga

__all__ = [
    "EDA",
    "EDAError",
    "Event",
    "Failure",
    "Projection",
    "RepairDecision",
    "Replies",
    "Reply",
    "RetryPolicy",
    "Saga",
    "Tables",
]
__version__ = "0.1.0"
