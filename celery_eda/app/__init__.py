"""The composition root: the class EDA, and everything added to a Celery app."""

from __future__ import annotations

from celery_eda.app.eda import EDA

__all__ = ["EDA"]
