"""Sagas: described step by step, executed across services, compensated when a step fails."""

from __future__ import annotations

from celery_eda.sagas.coordinator import Coordinator
from celery_eda.sagas.definition import (
    Block,
    Choice,
    Condition,
    Definition,
    Fail,
    Lock,
    Loop,
    Parallel,
    Part,
    Pivot,
    Sleep,
    Step,
    SubSaga,
    Wait,
    always,
    name_of,
)
from celery_eda.sagas.messages import WAKEUP_TASK
from celery_eda.sagas.record import Kind
from celery_eda.sagas.saga import Saga, saga_decorator
from celery_eda.sagas.steps import Steps
from celery_eda.sagas.store import HistoryEntry, SagaInstance, SagaStore, State
from celery_eda.sagas.testing import SagaTest
from celery_eda.sagas.wiring import Sagas

__all__ = [
    "WAKEUP_TASK",
    "Block",
    "Choice",
    "Condition",
    "Coordinator",
    "Definition",
    "Fail",
    "HistoryEntry",
    "Kind",
    "Lock",
    "Loop",
    "Parallel",
    "Part",
    "Pivot",
    "Saga",
    "SagaInstance",
    "SagaStore",
    "SagaTest",
    "Sagas",
    "Sleep",
    "State",
    "Step",
    "Steps",
    "SubSaga",
    "Wait",
    "always",
    "name_of",
    "saga_decorator",
]
