"""Orders: the mediator, which defines the flow of an order and its compensations."""

from __future__ import annotations

from typing import Any

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_eda.sagas.definition import Data
from celery_eda.sagas.steps import Steps
from example_project.service import service

app, eda = service("order")

MENU = {"hot chocolate": 450, "white chocolate": 500}
#: Seconds until the manager is asked about an order that is not made.
PATIENCE = 8


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Order(Base):
    """An order; the saga of the same number changes its state."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    drink: Mapped[str]
    state: Mapped[str] = mapped_column(default="placed")


@eda.task(name="order.close")
def close(session: Session, what: dict[str, Any]) -> None:
    """Close the delivered order."""
    session.get_one(Order, what["order"]).state = "delivered"


@eda.task(name="order.accept")
def accept(session: Session, what: dict[str, Any]) -> None:
    """Accept the order."""
    session.get_one(Order, what["order"]).state = "accepted"


@eda.task(name="order.discard")
def discard(session: Session, what: dict[str, Any]) -> None:
    """Discard the order; the customer owes nothing."""
    session.get_one(Order, what["order"]).state = "discarded"


def nobody_makes_it(data: Data) -> bool:
    return "cup" not in data


def the_manager_gives_up(data: Data) -> bool:
    return bool(data["manager"] != "again")


def out_of_stock(data: Data) -> bool:
    return not data["cup"]


@eda.saga("order")
def sell(steps: Steps) -> None:
    """Describe the flow; after a failure, completed steps are compensated in reverse order."""
    cup: dict[str, Any] = {"undo": "kitchen.throw_away", "keep": "cup"}
    steps.step("accept", accept, undo=discard)
    with steps.parallel("order"):
        with steps.branch():
            steps.step("pay", "payment.charge", undo="payment.refund")
        with steps.branch(), steps.parallel("barista", need=1):
            with steps.branch():
                steps.step("make", "kitchen.make", **cup)
            with steps.branch():
                steps.sleep("patience", PATIENCE)
        with steps.branch():
            steps.step("tell", "notification.tell", undo="notification.apologise")
    with steps.when(nobody_makes_it):
        steps.wait_for("manager", timeout=3600, default="give up")
        with steps.when(the_manager_gives_up):
            steps.fail("discarded", "the manager gave up")
        steps.step("make_again", "kitchen.make", **cup)
    with steps.when(out_of_stock):
        steps.fail("stock", "out of stock")
    steps.pivot("served")  # no compensation from here on
    steps.step("deliver", "delivery.deliver")
    steps.step("close", close)


def place(customer: str, drink: str) -> int:
    """Store an order and start its saga, in one transaction."""
    with eda.transaction() as session:
        order = Order(customer=customer, drink=drink)
        session.add(order)
        session.flush()
        what = {"order": order.id, "customer": customer, "drink": drink, "price": MENU[drink]}
        sell.start(what, id=f"order {order.id}", session=session)
        return order.id


def open_for_business() -> None:
    """Create the service's table."""
    Base.metadata.create_all(eda.databases.engine)
