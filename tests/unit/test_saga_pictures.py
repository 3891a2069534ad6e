"""Pictures of sagas: the definition's, and that of what has become of one."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from celery import Celery
from sqlalchemy import create_engine

from celery_eda import EDA, Saga
from celery_eda import saga_pictures as pictures
from celery_eda.drawing import Edge
from celery_eda.saga_definition import Data, Steps
from celery_eda.testing import SagaTest


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
    ElementTree.fromstring(drawn.to_svg())
    assert '"pay: payment.charge ↩ payment.refund"' in drawn.to_mermaid()


def test_a_saga_without_any_part_is_drawn_too() -> None:
    eda = EDA(Celery("shop", set_as_current=False), engine=create_engine("sqlite://"))
    nothing = eda.saga("nothing")(lambda steps: None)

    ElementTree.fromstring(pictures.graph(nothing.definition).to_svg())


def test_an_instance_is_drawn_with_a_bar_for_each_attempt(saga: Saga) -> None:
    test = SagaTest(saga)
    test.fails("north", ValueError("password=hunter2"))
    test.fails("south", ValueError("<closed>"))
    end = test.run({"n": 7})
    with test._engine.connect() as connection:
        instance = test._sagas.log.find(connection, "test")

    root = ElementTree.fromstring(pictures.timeline(instance, end.history))

    texts = [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0].startswith("test, order v3: compensated: south: ValueError: <closed>")
    assert texts[2::2] == ["lock seat", "pay", "north", "south", "undo pay"]
    assert texts[3::2][0] == "done"
    assert texts[3::2][3] == "failed, ValueError: <closed>"
    assert "hunter2" not in "".join(texts)
    bars = root.findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 1 + len(end.history)


def test_an_instance_that_waits_has_a_bar_without_an_end_and_says_when_time_is_over(
    saga: Saga,
) -> None:
    test = SagaTest(saga)
    test._at = lambda *_: None  # type: ignore[method-assign]  # a clock that stands still
    end = test.run({"n": 7})
    with test._engine.connect() as connection:
        instance = test._sagas.log.find(connection, "test")

    drawn = pictures.timeline(instance, end.history)

    assert "order v3: running" in drawn
    assert "wait approved" in drawn
    assert ">open<" in drawn
