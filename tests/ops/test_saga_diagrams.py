"""The flow chart of a saga's definition."""

from __future__ import annotations

import pytest
from celery import Celery
from sqlalchemy import create_engine

from celery_eda import EDA, Saga
from celery_eda.ops.diagrams import sagas as pictures
from celery_eda.ops.diagrams.graph import Edge
from celery_eda.sagas.definition import Data
from celery_eda.sagas.steps import Steps


def large(data: Data) -> bool:
    return bool(data["n"] > 5)


@pytest.fixture
def saga() -> Saga:
    eda = EDA(Celery("shop", set_as_current=False), engine=create_engine("sqlite://"))

    @eda.saga("shipping")
    def shipping(steps: Steps) -> None:
        steps.step("send", "depot.send")

    @eda.saga("order", version=3)
    def order(steps: Steps) -> None:
        steps.lock("seat", lambda data: f"seat {data['n']}", timeout=60)
        steps.step("pay", "payment.charge", undo="payment.refund")
        with steps.parallel(need=1):
            for who in ("north", "south"):
                with steps.branch():
                    steps.step(who, f"{who}.make")
        with steps.when(large):
            steps.wait_for("approved", timeout=3600, default=True)
        with steps.otherwise():
            steps.sleep("breathe", 5)
        with steps.repeat(lambda data: False, limit=3):
            steps.step("ask", "guest.ask")
        with steps.when(lambda data: False):
            steps.saga("ship", shipping)
        steps.pivot()

    return order


def test_a_definition_is_drawn_with_all_that_may_follow(saga: Saga) -> None:
    def said(edge: Edge) -> str:
        label = f" ({edge.label})" if edge.label else ""
        return f"{edge.start.label} →{label} {edge.end.label}"

    drawn = pictures.graph(saga.definition)

    assert {said(edge) for edge in drawn.edges} == {
        "order v3 → lock seat, 60 s at most",
        "lock seat, 60 s at most → pay: payment.charge ↩ payment.refund",
        "pay: payment.charge ↩ payment.refund → parallel",
        "parallel → north: north.make",
        "parallel → south: south.make",
        "north: north.make → parallel: 1 done",
        "south: south.make → parallel: 1 done",
        "parallel: 1 done → large?",
        "large? → (yes) wait for approved, 3600 s at most",
        "large? → (otherwise) breathe: 5 s",
        "wait for approved, 3600 s at most → loop1, at most 3 times",
        "breathe: 5 s → loop1, at most 3 times",
        "loop1, at most 3 times → (case 1) ask: guest.ask",
        "ask: guest.ask → loop1, at most 3 times",
        "loop1, at most 3 times → (done) choice2?",
        "choice2? → (case 1) ship: saga shipping v1",
        "choice2? → (none) pivot",
        "ship: saga shipping v1 → pivot",
        "pivot → completed",
    }
    assert '"pay: payment.charge ↩ payment.refund"' in drawn.to_mermaid()


def test_a_saga_without_any_part_is_drawn_too() -> None:
    eda = EDA(Celery("shop", set_as_current=False), engine=create_engine("sqlite://"))
    nothing = eda.saga("nothing")(lambda steps: None)

    drawn = pictures.graph(nothing.definition)

    assert [(edge.start.label, edge.end.label) for edge in drawn.edges] == [
        ("nothing v1", "completed"),
    ]
