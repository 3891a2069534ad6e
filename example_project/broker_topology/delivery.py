"""Delivery: delivers finished drinks."""

from __future__ import annotations

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_eda import Event
from example_project.service import service

app, eda = service("delivery")


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Delivery(Base):
    """A delivered drink."""

    __tablename__ = "deliveries"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    customer: Mapped[str]


@eda.on("kitchen.made", name="delivery.deliver")
def deliver(session: Session, event: Event) -> None:
    """Deliver the drink, and emit an event."""
    order = event.data
    session.add(Delivery(order_id=order["order"], customer=order["customer"]))
    eda.emit("delivery.delivered", order, key=order["order"])


def open_for_business() -> None:
    """Create the service's table."""
    Base.metadata.create_all(eda.databases.engine)
