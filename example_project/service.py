"""The Celery app of a service."""

from __future__ import annotations

from typing import Any

from celery import Celery

from celery_eda import EDA
from example_project import settings


def service(name: str) -> tuple[Celery, EDA]:
    """The app of one service, with its own database and task queue."""
    app = Celery(name)
    app.config_from_object(settings)
    extras: dict[str, Any] = {"eda_database_url": settings.database_of(name)}
    app.conf.update(task_default_queue=settings.queue_of(name), eda_embedded_relay=True, **extras)
    return app, EDA(app)
