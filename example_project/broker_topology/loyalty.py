"""Loyalty: points for what was paid. It came later, and nobody had to know of it."""

from __future__ import annotations

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_eda import Event
from example_project.service import service

app, eda = service("loyalty")


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Points(Base):
    """Points given, or taken back: one for each cent."""

    __tablename__ = "points"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    order_id: Mapped[str]
    points: Mapped[int]


@eda.on("payment.taken", "payment.refunded", name="loyalty.count", ordered=True)
def count(session: Session, event: Event) -> None:
    """Give the points of a payment, or take them back; those of an order in their order."""
    customer, price = event.data["customer"], event.data["price"]
    points = price if event.type == "payment.taken" else -price
    session.add(Points(customer=customer, order_id=event.key, points=points))


def open_for_business() -> None:
    """Make the service's own table."""
    Base.metadata.create_all(eda.engine)
