"""A saga whose payment is never made, since nobody consumes the queue of that service."""

from __future__ import annotations

from sqlalchemy.orm import Session

from celery_eda.sagas import Steps
from tests.faults.programs.order_system import app, eda, record  # noqa: F401  # app: for Celery


@eda.task(name="trust.ship")
def ship(session: Session, data: object) -> None:
    record("ship", 1)


@eda.saga("unpaid")
def unpaid(steps: Steps) -> None:
    steps.step("pay", "elsewhere.pay", queue="elsewhere")
    steps.step("ship", "trust.ship")


@eda.saga("unapproved")
def unapproved(steps: Steps) -> None:
    steps.wait_for("approved", timeout=36_000, default=True)
    steps.step("ship", "trust.ship")


@eda.saga("punctual")
def punctual(steps: Steps) -> None:
    steps.wait_for("approved", timeout=1, default=True)
    steps.step("ship", "trust.ship")
