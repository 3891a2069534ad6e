"""The airline: sells seats; its reply is a confirmation number or an error."""

from __future__ import annotations

from celery import Celery
from sqlalchemy import String, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_eda import EDA
from example_project import settings

app = Celery("airline")
app.config_from_object(settings)
app.conf.update(
    eda_database_url=settings.database_of("airline"),
    eda_embedded_relay=True,
    task_routes={"airline.*": {"queue": settings.queue_of("airline")}},
)
eda = EDA(app)

SEATS = 3


class SoldOut(Exception):
    """No seat is left on the flight."""


# Both services register the error under this name, so that it arrives as this class.
eda.register_error(SoldOut, "airline.SoldOut")


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Booking(Base):
    """A sold seat; the confirmation number is derived from its id."""

    __tablename__ = "bookings"

    id: Mapped[int] = mapped_column(primary_key=True)
    flight: Mapped[str]
    passenger: Mapped[str]


@eda.task(name="airline.book")
def book(session: Session, flight: str, passenger: str) -> dict[str, str]:
    """Sell a seat. The confirmation is sent if and only if the sale commits.

    Raises:
        SoldOut: no seat is left.
    """
    sold = select(func.count()).select_from(Booking).where(Booking.flight == flight)
    if session.scalar(sold) == SEATS:
        raise SoldOut(flight)
    booking = Booking(flight=flight, passenger=passenger)
    session.add(booking)
    session.flush()
    return {"number": f"{flight}-{booking.id:04}", "passenger": passenger}


def open_for_business() -> None:
    """Create the airline's table."""
    Base.metadata.create_all(eda.databases.engine)
