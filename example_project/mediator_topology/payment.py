"""Payment: the customers' accounts."""

from __future__ import annotations

from typing import Any

from celery.exceptions import Ignore
from sqlalchemy import String, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from example_project.service import service

app, eda = service("payment")

CUSTOMERS = ("ada", "ben", "chen")
OPENING_BALANCE = 10_000


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Account(Base):
    """A customer's money, in cents."""

    __tablename__ = "accounts"

    customer: Mapped[str] = mapped_column(primary_key=True)
    balance: Mapped[int]


@eda.task(name="payment.charge")
def charge(session: Session, what: dict[str, Any]) -> None:
    """Charge the price to the customer's account, or refuse."""
    customer, price = what["customer"], what["price"]
    # The database does the subtraction, since a concurrent order may charge this account.
    can_pay = update(Account).where(Account.customer == customer, Account.balance >= price)
    if not session.execute(can_pay.values(balance=Account.balance - price)).rowcount:
        raise Ignore(f"{customer} cannot pay {price}")


@eda.task(name="payment.refund")
def refund(session: Session, what: dict[str, Any]) -> None:
    """Refund the price."""
    account = update(Account).where(Account.customer == what["customer"])
    session.execute(account.values(balance=Account.balance + what["price"]))


def open_for_business() -> None:
    """Create the table and open the customers' accounts."""
    Base.metadata.create_all(eda.databases.engine)
    with eda.transaction() as session:
        for customer in CUSTOMERS:
            session.merge(Account(customer=customer, balance=OPENING_BALANCE))
