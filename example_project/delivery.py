"""The delivery service: delivers drinks to customers."""

from __future__ import annotations

from celery import Celery
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_eda import EDA
from example_project import settings

app = Celery("delivery")
app.config_from_object(settings)
app.conf.eda_database_url = settings.database_of("delivery")
eda = EDA(app)


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Delivery(Base):
    """A delivered order."""

    __tablename__ = "deliveries"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[str] = mapped_column(index=True)
    customer: Mapped[str]


@eda.task(name="delivery.deliver")
def deliver(session: Session, order_id: str, customer: str) -> None:
    """Deliver an order, then report it to the order service."""
    session.add(Delivery(order_id=order_id, customer=customer))
    app.send_task("order.delivered", kwargs={"order_id": order_id})


def open_for_business() -> None:
    """Create the tables."""
    Base.metadata.create_all(eda.databases.engine)
