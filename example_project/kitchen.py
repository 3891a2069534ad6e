"""The kitchen: stock, and the drinks made from it."""

from __future__ import annotations

import time

from celery import Celery
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_eda import EDA
from example_project import settings

app = Celery("kitchen")
app.config_from_object(settings)
app.conf.eda_database_url = settings.database_of("kitchen")
eda = EDA(app)

SECONDS_TO_MAKE = {"hot chocolate": 0.1, "white chocolate": 0.1, "chocolate with chili": 0.2}
OPENING_STOCK = 10_000


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Stock(Base):
    """A drink's portions left, and the time to make it."""

    __tablename__ = "stock"

    drink: Mapped[str] = mapped_column(primary_key=True)
    portions: Mapped[int]
    seconds_to_make: Mapped[float]


class Cup(Base):
    """A drink that was made."""

    __tablename__ = "cups"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[str] = mapped_column(index=True)
    drink: Mapped[str]


@eda.task(name="kitchen.make")
def make(session: Session, order_id: str, customer: str, drink: str) -> None:
    """Make a drink, subtract it from the stock, then request its delivery."""
    stock = session.get_one(Stock, drink)
    # Before the first write, since a write locks out others until the commit.
    time.sleep(stock.seconds_to_make)
    stock.portions = Stock.portions - 1
    session.add(Cup(order_id=order_id, drink=drink))
    app.send_task("delivery.deliver", kwargs={"order_id": order_id, "customer": customer})


def open_for_business() -> None:
    """Create the tables and fill the stock."""
    Base.metadata.create_all(eda.databases.engine)
    with eda.transaction() as session:
        for drink, seconds in SECONDS_TO_MAKE.items():
            session.merge(Stock(drink=drink, portions=OPENING_STOCK, seconds_to_make=seconds))
