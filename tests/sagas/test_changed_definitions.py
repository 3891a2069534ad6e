"""A definition that was changed without a new version, while sagas of it were running."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import create_engine

from celery_eda import EDA
from celery_eda.sagas.steps import Steps, defined
from celery_eda.sagas.testing import End, SagaTest

Describe = Callable[[Steps], Any]


class Changing:
    """A saga whose definition changes while it waits for the signal ``go``."""

    def __init__(self, describe: Describe) -> None:
        eda = EDA(Celery("shop", set_as_current=False), engine=create_engine("sqlite://"))
        self.test = SagaTest(eda.saga("saga")(describe))

    def become(self, describe: Describe) -> None:
        definitions = self.test._sagas.engine.definitions
        definitions.known["saga"][1] = defined("saga", 1, describe)

    def go(self) -> End:
        self.test.signals("go")
        return self.test.run()


def pay(steps: Steps, name: str = "pay") -> None:
    steps.step(name, "payment.charge", undo="payment.refund")


def make(steps: Steps, name: str = "make") -> None:
    steps.step(name, "kitchen.make", undo="kitchen.throw_away")


def tell(steps: Steps) -> None:
    steps.step("tell", "notification.tell")


def original(steps: Steps) -> None:
    pay(steps)
    make(steps)
    steps.wait_for("go")
    tell(steps)


def renamed(steps: Steps) -> None:
    pay(steps, "charge")
    make(steps)
    steps.wait_for("go")
    tell(steps)


def reordered(steps: Steps) -> None:
    tell(steps)
    pay(steps)
    make(steps)
    steps.wait_for("go")


def with_one_more_before(steps: Steps) -> None:
    pay(steps)
    steps.step("check", "payment.check")
    make(steps)
    steps.wait_for("go")
    tell(steps)


def of_another_kind(steps: Steps) -> None:
    steps.sleep("pay", 1)
    make(steps)
    steps.wait_for("go")
    tell(steps)


def inside_a_loop(steps: Steps) -> None:
    with steps.repeat(lambda data: "pay" not in data):
        pay(steps)
    make(steps)
    steps.wait_for("go")
    tell(steps)


def without_one_that_is_done(steps: Steps) -> None:
    make(steps)
    steps.wait_for("go")
    tell(steps)


@pytest.mark.parametrize(
    ("describe", "why"),
    [
        (renamed, "'pay', which is not in the definition"),
        (reordered, "'pay' has begun, but 'tell' before it has not"),
        (with_one_more_before, "'make' has begun, but 'check' before it has not"),
        (of_another_kind, "a step 'pay', now a sleep"),
        (inside_a_loop, "'pay', now inside 1 loops"),
        (without_one_that_is_done, "'pay', which is not in the definition"),
    ],
)
def test_a_saga_that_does_not_fit_its_definition_any_more_is_parked(
    describe: Describe, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    saga = Changing(original)
    saga.test.run({"n": 1})
    saga.become(describe)

    end = saga.go()

    assert end.state == "parked"
    assert end.error is not None
    assert why in end.error
    assert end.calls == ["pay", "make"], "nothing is done twice, and nothing is compensated"
    with caplog.at_level(logging.ERROR):
        saga.test.resumes()
    assert "is parked, because its definition has changed" in caplog.text


def test_a_saga_that_was_parked_goes_on_with_the_definition_restored() -> None:
    """Even with a result that came while the definition had no part for it."""
    saga = Changing(original)

    def receipt(_: Any) -> str:
        saga.become(renamed)
        return "receipt 7"

    saga.test.returns("pay", receipt)
    parked = saga.test.run({"n": 1})
    called = list(parked.calls)
    saga.become(original)

    saga.test.resumes()
    saga.test.signals("go")
    end = saga.test.run()

    assert (parked.state, called) == ("parked", ["pay"])
    assert end.state == "completed"
    assert end.calls == ["pay", "make", "tell"]
    assert end.data["pay"] == "receipt 7"


def test_a_compensation_does_not_begin_with_a_definition_that_does_not_fit() -> None:
    saga = Changing(original)
    saga.test.run({"n": 1})
    saga.become(renamed)
    saga.test.cancels()
    parked = saga.test.run()
    called = list(parked.calls)
    saga.become(original)

    saga.test.resumes()
    end = saga.test.run()

    assert (parked.state, called) == ("parked", ["pay", "make"])
    assert end.state == "cancelled"
    assert end.calls == ["pay", "make", "undo make", "undo pay"]


def test_a_timer_is_not_lost_while_the_definition_does_not_fit() -> None:
    def before(steps: Steps) -> None:
        pay(steps)
        steps.wait_for("go", timeout=100, default="by itself")
        tell(steps)

    def between(steps: Steps) -> None:
        pay(steps)
        steps.wait_for("proceed", timeout=100, default="by itself")
        tell(steps)

    saga = Changing(before)
    later: list[Describe] = [between, between, before]
    wake = saga.test._sagas.wake

    def wake_with_another(*arguments: Any) -> None:
        if later:
            saga.become(later.pop(0))
        wake(*arguments)

    object.__setattr__(saga.test._sagas, "wake", wake_with_another)
    parked = saga.test.run({"n": 1})

    saga.test.resumes()
    end = saga.test.run()

    assert parked.state == "parked"
    assert (end.state, end.data["go"]) == ("completed", "by itself")


def branches(first: Callable[[Steps], None], second: Callable[[Steps], None]) -> Describe:
    def describe(steps: Steps) -> None:
        with steps.parallel(need=1):
            with steps.branch():
                first(steps)
            with steps.branch():
                second(steps)
        steps.wait_for("go")
        tell(steps)

    return describe


def test_branches_that_change_places_do_not_fit() -> None:
    def slow(steps: Steps) -> None:
        steps.sleep("rest", 60)
        make(steps)

    saga = Changing(branches(pay, slow))
    saga.test.run({"n": 1})
    saga.become(branches(slow, pay))

    end = saga.go()

    assert end.state == "parked"
    assert end.error is not None
    assert "a branch of 'parallel' is done, but 'make' in it never began" in end.error


def test_cases_that_change_places_do_not_fit() -> None:
    def choosing(first: Callable[[Steps], None], second: Callable[[Steps], None]) -> Describe:
        def describe(steps: Steps) -> None:
            with steps.when(lambda data: data["n"] == 1, name="which"):
                first(steps)
            with steps.otherwise():
                second(steps)
            steps.wait_for("go")

        return describe

    saga = Changing(choosing(pay, make))
    saga.test.run({"n": 1})
    saga.become(choosing(make, pay))

    end = saga.go()

    assert end.state == "parked"
    assert end.error is not None
    assert "a case of 'which' has begun that was not chosen" in end.error


def test_what_is_added_behind_the_place_that_a_saga_has_reached_fits() -> None:
    def extended(steps: Steps) -> None:
        original(steps)
        steps.step("deliver", "delivery.deliver")

    saga = Changing(original)
    saga.test.run({"n": 1})
    saga.become(extended)
    saga.test._tasks["delivery.deliver"] = "deliver"

    end = saga.go()

    assert (end.state, end.calls) == ("completed", ["pay", "make", "tell", "deliver"])
