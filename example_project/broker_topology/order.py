"""Orders: placed at the counter, and their states."""

from __future__ import annotations

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_eda import Event
from example_project.service import service

app, eda = service("order")

MENU = {"hot chocolate": 450, "white chocolate": 500}


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Order(Base):
    """An order; its state follows the events of the other services."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    drink: Mapped[str]
    state: Mapped[str] = mapped_column(default="placed")


def place(customer: str, drink: str) -> int:
    """Store an order and emit an event, in one transaction."""
    with eda.transaction() as session:
        order = Order(customer=customer, drink=drink)
        session.add(order)
        session.flush()
        what = {"order": order.id, "customer": customer, "drink": drink, "price": MENU[drink]}
        eda.emit("order.placed", what, key=order.id)
        return order.id


@eda.on("delivery.delivered", name="order.close")
def close(session: Session, event: Event) -> None:
    """Close the delivered order."""
    session.get_one(Order, event.data["order"]).state = "delivered"


@eda.on("payment.refunded", "payment.failed", name="order.discard")
def discard(session: Session, event: Event) -> None:
    """Discard the order: nothing was made, and the customer owes nothing."""
    session.get_one(Order, event.data["order"]).state = "discarded"


def open_for_business() -> None:
    """Create the service's table."""
    Base.metadata.create_all(eda.databases.engine)
