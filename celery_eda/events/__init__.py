"""Events: emitted, stored, subscribed to, replayed and projected."""

from __future__ import annotations

from celery_eda.events.decorators import SubscriptionDecorator
from celery_eda.events.projections.projection import Apply, Projection
from celery_eda.events.projections.rebuild import Difference
from celery_eda.events.projections.shadows import Shadow
from celery_eda.events.queues import EXPIRES
from celery_eda.events.registry import EventRegistry
from celery_eda.events.store import EventFilter
from celery_eda.events.subscriptions import PREFIX, Subscription
from celery_eda.events.wiring import Events

__all__ = [
    "EXPIRES",
    "PREFIX",
    "Apply",
    "Difference",
    "EventFilter",
    "EventRegistry",
    "Events",
    "Projection",
    "Shadow",
    "Subscription",
    "SubscriptionDecorator",
]
