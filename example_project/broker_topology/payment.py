"""Payment: the customers' accounts. Refunds are computed from the service's own events."""

from __future__ import annotations

from sqlalchemy import String, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_eda import Event
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


@eda.on("order.placed", name="payment.charge")
def charge(session: Session, event: Event) -> None:
    """Charge the price to the customer's account, and emit an event."""
    order = event.data
    customer, price = order["customer"], order["price"]
    # The database does the subtraction, since a concurrent order may charge this account.
    can_pay = update(Account).where(Account.customer == customer, Account.balance >= price)
    paid = session.execute(can_pay.values(balance=Account.balance - price)).rowcount
    eda.emit("payment.taken" if paid else "payment.failed", order, key=order["order"])


@eda.on("stock.failed", name="payment.refund")
def refund(session: Session, event: Event) -> None:
    """Refund the amount that this service charged for the order, according to its own events."""
    order = event.data["order"]
    owed, customer = eda.fold(f"payment.{order}", (0, ""), _owed)
    account = update(Account).where(Account.customer == customer)
    session.execute(account.values(balance=Account.balance + owed))
    what = {"order": order, "customer": customer, "price": owed}
    eda.emit("payment.refunded", what, key=order)


def _owed(state: tuple[int, str], event: Event) -> tuple[int, str]:
    amount = {"payment.taken": 1, "payment.refunded": -1}.get(event.type, 0) * event.data["price"]
    return state[0] + amount, event.data["customer"]


def open_for_business() -> None:
    """Create the table and open the customers' accounts."""
    Base.metadata.create_all(eda.databases.engine)
    with eda.transaction() as session:
        for customer in CUSTOMERS:
            session.merge(Account(customer=customer, balance=OPENING_BALANCE))
