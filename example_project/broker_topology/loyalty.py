"""Loyalty: points for payments. The service joined later; no other service had to change."""

from __future__ import annotations

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_eda import Event
from example_project.service import service

app, eda = service("loyalty")


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Points(Base):
    """Points granted or revoked: one per cent."""

    __tablename__ = "points"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    order_id: Mapped[str]
    points: Mapped[int]


@eda.on("payment.taken", "payment.refunded", name="loyalty.count", ordered=True)
def count(session: Session, event: Event) -> None:
    """Grant the points of a payment or revoke them, in the order of the events of an order."""
    customer, price = event.data["customer"], event.data["price"]
    points = price if event.type == "payment.taken" else -price
    session.add(Points(customer=customer, order_id=event.key, points=points))


def open_for_business() -> None:
    """Create the service's table."""
    Base.metadata.create_all(eda.databases.engine)
