"""The kitchen: makes drinks while stock lasts."""

from __future__ import annotations

from typing import Any

from sqlalchemy import String, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from example_project.service import service

app, eda = service("kitchen")

OPENING_STOCK = 7


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Stock(Base):
    """The portions left of a drink, and the cups thrown away."""

    __tablename__ = "stock"

    drink: Mapped[str] = mapped_column(primary_key=True)
    portions: Mapped[int]
    wasted: Mapped[int]


@eda.task(name="kitchen.make")
def make(session: Session, what: dict[str, Any]) -> bool:
    """Make the drink, or refuse if stock ran out."""
    # The database does the subtraction, since a concurrent order may take a portion.
    one_less = update(Stock).where(Stock.drink == what["drink"], Stock.portions > 0)
    return bool(session.execute(one_less.values(portions=Stock.portions - 1)).rowcount)


@eda.task(name="kitchen.throw_away")
def throw_away(session: Session, what: dict[str, Any]) -> None:
    """Throw the cup away, if there is one."""
    stock = update(Stock).where(Stock.drink == what["drink"])
    session.execute(stock.values(wasted=Stock.wasted + int(what["cup"])))


def open_for_business() -> None:
    """Create the table and fill the stock."""
    Base.metadata.create_all(eda.databases.engine)
    with eda.transaction() as session:
        for drink in ("hot chocolate", "white chocolate"):
            session.merge(Stock(drink=drink, portions=OPENING_STOCK, wasted=0))
