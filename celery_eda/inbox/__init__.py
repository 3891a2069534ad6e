"""The idempotent inbox: each message received takes effect once, and is then acknowledged."""

from __future__ import annotations

from celery_eda.inbox.decorator import TaskDecorator
from celery_eda.inbox.safety import make_safe
from celery_eda.inbox.task import (
    ReliableTask,
    is_asynchronous,
    made_reliable,
    run_async,
    take_when_due,
)
from celery_eda.inbox.wiring import Inbox

__all__ = [
    "Inbox",
    "ReliableTask",
    "TaskDecorator",
    "is_asynchronous",
    "made_reliable",
    "make_safe",
    "run_async",
    "take_when_due",
]
