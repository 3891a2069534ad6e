"""Delivery: delivers finished drinks."""

from __future__ import annotations

from typing import Any

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

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


@eda.task(name="delivery.deliver")
def deliver(session: Session, what: dict[str, Any]) -> None:
    """Deliver the drink."""
    session.add(Delivery(order_id=what["order"], customer=what["customer"]))


def open_for_business() -> None:
    """Create the service's table."""
    Base.metadata.create_all(eda.databases.engine)
