"""Reliable, event-driven Celery: transactional outbox, idempotent inbox, late acknowledgement."""

from celery_eda.app import EDA
from celery_eda.errors import EDAError
from celery_eda.event import Event
from celery_eda.failure import Failure, RepairDecision
from celery_eda.projections import Projection
from celery_eda.reply import Replies, Reply
from celery_eda.retry import RetryPolicy
from celery_eda.saga import Saga
from celery_eda.tables import Tables

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
