"""The kitchen: makes paid drinks while stock lasts."""

from __future__ import annotations

from sqlalchemy import String, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_eda import Event
from example_project.service import service

app, eda = service("kitchen")

OPENING_STOCK = 7


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Stock(Base):
    """The portions left of a drink."""

    __tablename__ = "stock"

    drink: Mapped[str] = mapped_column(primary_key=True)
    portions: Mapped[int]


@eda.on("payment.taken", name="kitchen.make")
def make(session: Session, event: Event) -> None:
    """Make the drink, or emit that stock ran out; the customer has paid by then."""
    order = event.data
    # The database does the subtraction, since a concurrent order may take a portion.
    one_less = update(Stock).where(Stock.drink == order["drink"], Stock.portions > 0)
    if session.execute(one_less.values(portions=Stock.portions - 1)).rowcount:
        eda.emit("kitchen.made", order, key=order["order"])
    else:
        eda.emit("stock.failed", {"order": order["order"]}, key=order["order"])


def open_for_business() -> None:
    """Create the table and fill the stock."""
    Base.metadata.create_all(eda.databases.engine)
    with eda.transaction() as session:
        for drink in ("hot chocolate", "white chocolate"):
            session.merge(Stock(drink=drink, portions=OPENING_STOCK))
