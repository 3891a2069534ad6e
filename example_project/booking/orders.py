"""Order entry: assigns each order the id that its customer needs."""

from __future__ import annotations

from celery import Celery
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_eda import EDA
from example_project import settings

app = Celery("orders")
app.config_from_object(settings)
app.conf.update(
    eda_database_url=settings.database_of("orders"),
    eda_embedded_relay=True,
    task_routes={"orders.*": {"queue": settings.queue_of("orders")}},
)
eda = EDA(app)

FIRST = 124


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Order(Base):
    """An order of a customer."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    what: Mapped[str]


@eda.task(name="orders.place")
def place(session: Session, customer: str, what: str) -> int:
    """Store an order; returns its id."""
    order = Order(customer=customer, what=what)
    if not session.query(Order).count():
        order.id = FIRST
    session.add(order)
    session.flush()
    return order.id


def open_for_business() -> None:
    """Create the table of orders."""
    Base.metadata.create_all(eda.databases.engine)
