"""The travel agency: asks order entry and the airline, and needs their answers.

It knows their tasks by name only; each has a database of its own.
"""

from __future__ import annotations

from celery import Celery
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from celery_eda import EDA, Reply
from example_project import settings

app = Celery("agency")
app.config_from_object(settings)
app.conf.update(
    eda_database_url=settings.database_of("agency"),
    eda_embedded_relay=True,
    eda_send_after_commit=True,
    eda_request_timeout=30.0,
    task_routes={
        "orders.*": {"queue": settings.queue_of("orders")},
        "airline.*": {"queue": settings.queue_of("airline")},
    },
)
eda = EDA(app)


class SoldOut(Exception):
    """The airline has no seat left."""


eda.register_error(SoldOut, "airline.SoldOut")


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Trip(Base):
    """A trip that a customer wants, and the request under which its seat was asked for."""

    __tablename__ = "trips"

    customer: Mapped[str] = mapped_column(primary_key=True)
    request: Mapped[str]


def order(customer: str) -> Reply[int]:
    """Place an order; its id comes back in a reply with the same correlation id."""
    return eda.request("orders.place", (customer, "a trip"))


def book(customer: str, flight: str, address: str) -> Reply[dict[str, str]]:
    """Ask for a seat and note it, in one transaction: both happen, or neither."""
    with eda.transaction() as session:
        reply = eda.request("airline.book", (flight, customer), address=address)
        session.merge(Trip(customer=customer, request=reply.correlation_id))
    return reply


def confirmation_of(customer: str) -> str:
    """The confirmation number of a seat asked for durably, by whichever process did."""
    with eda.transaction() as session:
        request = session.get_one(Trip, customer).request
    confirmation: dict[str, str] = eda.reply(request).get()
    return confirmation["number"]


def open_for_business() -> None:
    """Make the agency's own table."""
    Base.metadata.create_all(eda.engine)
