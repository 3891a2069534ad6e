"""Notification: messages to customers."""

from __future__ import annotations

from typing import Any

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from example_project.service import service

app, eda = service("notification")


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Note(Base):
    """A message to a customer."""

    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    text: Mapped[str]


@eda.task(name="notification.tell")
def tell(session: Session, what: dict[str, Any]) -> None:
    """Confirm the order to the customer."""
    session.add(Note(order_id=what["order"], text="we are at it"))


@eda.task(name="notification.apologise")
def apologise(session: Session, what: dict[str, Any]) -> None:
    """Tell the customer that the order is cancelled."""
    session.add(Note(order_id=what["order"], text="we are sorry"))


def open_for_business() -> None:
    """Create the service's table."""
    Base.metadata.create_all(eda.databases.engine)
