"""The payment service: the customers' accounts and charges."""

from __future__ import annotations

from celery import Celery
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_eda import EDA
from example_project import settings

app = Celery("payment")
app.config_from_object(settings)
app.conf.eda_database_url = settings.database_of("payment")
eda = EDA(app)

CUSTOMERS = ("ada", "ben", "chen", "dora", "emil", "fay")
OPENING_BALANCE = 1_000_000


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Account(Base):
    """A customer's money, in cents."""

    __tablename__ = "accounts"

    customer: Mapped[str] = mapped_column(primary_key=True)
    balance: Mapped[int]


class Charge(Base):
    """A charge to an account for an order."""

    __tablename__ = "charges"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[str] = mapped_column(index=True)
    customer: Mapped[str]
    amount: Mapped[int]


@eda.task(name="payment.charge")
def charge(session: Session, order_id: str, customer: str, drink: str, price: int) -> None:
    """Charge an order to its customer's account, then request the drink."""
    account = session.get_one(Account, customer)
    # The database does the subtraction, since a concurrent order may charge this account.
    account.balance = Account.balance - price
    session.add(Charge(order_id=order_id, customer=customer, amount=price))
    app.send_task(
        "kitchen.make", kwargs={"order_id": order_id, "customer": customer, "drink": drink}
    )


def open_for_business() -> None:
    """Create the tables and open the customers' accounts."""
    Base.metadata.create_all(eda.databases.engine)
    with eda.transaction() as session:
        for customer in CUSTOMERS:
            session.merge(Account(customer=customer, balance=OPENING_BALANCE))
