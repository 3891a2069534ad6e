"""The demo's judge finds what is missing, what is double, and what should not be there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import create_engine, delete
from sqlalchemy.orm import DeclarativeBase, Session

from example_project import delivery, kitchen, order, payment
from example_project.delivery import Delivery
from example_project.demo.customers import Told
from example_project.demo.judge import EFFECTS, Books, Verdict
from example_project.kitchen import Cup
from example_project.order import Order, Progress
from example_project.payment import Charge

PLACED = ("one", "two", "three")
ROLLED_BACK = ("never",)
TOLD = Told(frozenset(PLACED), frozenset(ROLLED_BACK))
SERVICES = {"order": order, "payment": payment, "kitchen": kitchen, "delivery": delivery}

#: A row of each effect.
ROWS: dict[str, Callable[[str], DeclarativeBase]] = {
    "charged": lambda order: Charge(order_id=order, customer="ada", amount=350),
    "made": lambda order: Cup(order_id=order, drink="hot chocolate"),
    "delivered": lambda order: Delivery(order_id=order, customer="ada"),
    "closed": lambda order: Progress(order_id=order, state="delivered"),
}


class Ledgers:
    """Four databases, in which every placed order has taken effect once."""

    def __init__(self, folder: Path) -> None:
        self.urls = {name: f"sqlite:///{folder / name}.db" for name in SERVICES}
        for name, service in SERVICES.items():
            service.Base.metadata.create_all(create_engine(self.urls[name]))
        for number in PLACED:
            self.place(number)
            for effect in EFFECTS:
                self.add(effect, number)

    def place(self, number: str) -> None:
        with self._session("order") as session:
            session.add(Order(id=number, customer="ada", drink="hot chocolate", price=350))
            session.add(Progress(order_id=number, state="placed"))
            session.commit()

    def add(self, effect: str, number: str) -> None:
        with self._session(EFFECTS[effect][0]) as session:
            session.add(ROWS[effect](number))
            session.commit()

    def remove(self, effect: str, number: str) -> None:
        model = type(ROWS[effect](number))
        with self._session(EFFECTS[effect][0]) as session:
            session.execute(delete(model).where(model.order_id == number))
            session.commit()

    def remove_order(self, number: str) -> None:
        with self._session("order") as session:
            session.execute(delete(Order).where(Order.id == number))
            session.commit()

    def verdict(self) -> Verdict:
        return Books(self.urls).judge(TOLD)

    def _session(self, service: str) -> Session:
        return Session(create_engine(self.urls[service]))


@pytest.fixture
def ledgers(tmp_path: Path) -> Ledgers:
    return Ledgers(tmp_path)


def counts(verdict: Verdict) -> tuple[int, int, int]:
    """Lost, duplicated, phantom."""
    return verdict.count("lost"), verdict.count("duplicated"), verdict.count("phantom")


def test_untouched_databases_are_clean(ledgers: Ledgers) -> None:
    verdict = ledgers.verdict()

    assert verdict.faults == []
    assert (verdict.published, verdict.rolled_back) == (3, 1)
    assert verdict.effects == dict.fromkeys(EFFECTS, 3)


@pytest.mark.parametrize("effect", EFFECTS)
def test_a_missing_effect_is_lost(ledgers: Ledgers, effect: str) -> None:
    ledgers.remove(effect, "two")

    assert counts(ledgers.verdict()) == (1, 0, 0)


@pytest.mark.parametrize("effect", EFFECTS)
def test_each_effect_beyond_the_first_is_a_duplicate(ledgers: Ledgers, effect: str) -> None:
    ledgers.add(effect, "two")
    ledgers.add(effect, "two")

    assert counts(ledgers.verdict()) == (0, 2, 0)


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("number", ["never", "unheard of"])
def test_an_effect_of_an_order_that_was_not_committed_is_a_phantom(
    ledgers: Ledgers, effect: str, number: str
) -> None:
    ledgers.add(effect, number)

    assert counts(ledgers.verdict()) == (0, 0, 1)


def test_a_double_effect_does_not_make_up_for_a_missing_one(ledgers: Ledgers) -> None:
    ledgers.remove("made", "one")
    ledgers.add("made", "two")

    assert counts(ledgers.verdict()) == (1, 1, 0)


def test_an_order_that_a_customer_was_told_is_committed_must_be_there(ledgers: Ledgers) -> None:
    for effect in EFFECTS:
        ledgers.remove(effect, "three")
    ledgers.remove_order("three")

    assert counts(ledgers.verdict()) == (1, 0, 0)


def test_an_order_that_was_rolled_back_must_not_be_there(ledgers: Ledgers) -> None:
    ledgers.place("never")
    for effect in EFFECTS:
        ledgers.add(effect, "never")

    assert counts(ledgers.verdict()) == (0, 0, 1)
