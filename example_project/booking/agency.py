"""The travel agency: sends requests to order entry and the airline.

The agency knows only the names of their tasks; each service has a database of its own.
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
    """A trip of a customer, and the request for its seat."""

    __tablename__ = "trips"

    customer: Mapped[str] = mapped_column(primary_key=True)
    request: Mapped[str]


def order(customer: str) -> Reply[int]:
    """Request an order; the reply, with the same correlation id, has the id of the order."""
    return eda.request("orders.place", (customer, "a trip"))


def book(customer: str, flight: str, address: str) -> Reply[dict[str, str]]:
    """Record the trip and request its seat, in one transaction: both happen, or neither."""
    with eda.transaction() as session:
        reply = eda.request("airline.book", (flight, customer), address=address)
        session.merge(Trip(customer=customer, request=reply.correlation_id))
    return reply


def confirmation_of(customer: str) -> str:
    """The confirmation number of a seat that any process requested durably."""
    with eda.transaction() as session:
        request = session.get_one(Trip, customer).request
    confirmation: dict[str, str] = eda.reply(request).get()
    return confirmation["number"]


def open_for_business() -> None:
    """Create the agency's table."""
    Base.metadata.create_all(eda.databases.engine)
