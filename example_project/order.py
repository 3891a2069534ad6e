"""The order service: the menu, the counter, and the progress of orders."""

from __future__ import annotations

from uuid import uuid4

from celery import Celery
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_eda import EDA
from example_project import settings

app = Celery("order")
app.config_from_object(settings)
app.conf.eda_database_url = settings.database_of("order")
eda = EDA(app)

MENU = {"hot chocolate": 350, "white chocolate": 390, "chocolate with chili": 420}


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Drink(Base):
    """A line of the menu; prices are in cents."""

    __tablename__ = "menu"

    name: Mapped[str] = mapped_column(primary_key=True)
    price: Mapped[int]


class Order(Base):
    """A customer's order."""

    __tablename__ = "orders"

    id: Mapped[str] = mapped_column(primary_key=True)
    customer: Mapped[str]
    drink: Mapped[str]
    price: Mapped[int]


class Progress(Base):
    """A state of an order, one row each; the latest row is the current state."""

    __tablename__ = "order_progress"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[str] = mapped_column(index=True)
    state: Mapped[str]


def place(session: Session, customer: str, drink: str) -> str:
    """Place an order. If *session* commits, it is paid, made and delivered; otherwise nothing is.

    Returns:
        The id of the order.

    Raises:
        NoResultFound: *drink* is not on the menu.
    """
    price = session.get_one(Drink, drink).price
    order = Order(id=str(uuid4()), customer=customer, drink=drink, price=price)
    session.add_all([order, Progress(order_id=order.id, state="placed")])
    app.send_task(
        "payment.charge",
        kwargs={"order_id": order.id, "customer": customer, "drink": drink, "price": price},
    )
    return order.id


@eda.task(name="order.delivered")
def delivered(session: Session, order_id: str) -> None:
    """Close a delivered order."""
    session.add(Progress(order_id=order_id, state="delivered"))


def open_for_business() -> None:
    """Create the tables and write the menu."""
    Base.metadata.create_all(eda.databases.engine)
    with eda.transaction() as session:
        for name, price in MENU.items():
            session.merge(Drink(name=name, price=price))
