"""A market that is moved by events: ``python -m tests.faults.programs.market SEED LAST``.

Money goes from customers to the till, portions from the shelf to the customers; what cannot be
delivered is paid back from the till's own events. A copy of the orders is kept, and an auditor
notes each event. The numbers of the orders begin anew with each seed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Column, Integer, String, Table, insert, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from celery_eda import Event
from tests.faults.programs.order_system import app, eda
from tests.faults.programs.tables import accounts, effects, metadata

__all__ = ["app", "eda"]
#: Ids of accounts: the customers', in cents, then what the market has.
CUSTOMERS, TILL, SHELF = range(4), 100, 101
OPENING, PORTIONS, PRICE = 10_000, 60, 30

#: Each order as its events tell.
copies = Table(
    "copies",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("state", String(40), nullable=False),
    Column("price", Integer, nullable=False),
    Column("seen", Integer, nullable=False),
)


def move(session: Session, account: int, amount: int) -> bool:
    """Add *amount* to an account; False if that would leave less than nothing."""
    enough = update(accounts).where(accounts.c.id == account, accounts.c.visits + amount >= 0)
    done = session.execute(enough.values(visits=accounts.c.visits + amount)).rowcount  # type: ignore[attr-defined]
    return bool(done)


def place(number: int, customer: int) -> None:
    what = {"order": number, "customer": customer, "price": PRICE + number % 7}
    with eda.transaction():
        eda.emit("order.placed", what, key=number)
        eda.emit("counter.rang", what)


@eda.on("order.placed", name="market.charge")
def charge(session: Session, event: Event) -> None:
    order = event.data
    if move(session, order["customer"], -order["price"]):
        move(session, TILL, order["price"])
        eda.emit("order.paid", order, key=order["order"])
    else:
        eda.emit("order.refused", order, key=order["order"])


@eda.on("order.paid", name="market.deliver")
def deliver(session: Session, event: Event) -> None:
    order = event.data
    found = move(session, SHELF, -1)
    eda.emit("order.delivered" if found else "order.failed", order, key=order["order"])


def paid(so_far: int, event: Event) -> int:
    return so_far + (event.data["price"] if event.type == "order.paid" else 0)


@eda.on("order.failed", name="market.refund")
def refund(session: Session, event: Event) -> None:
    """Pay back what the order's own events say that was paid."""
    order = event.data
    owed = eda.fold(event.stream or "", 0, paid)
    move(session, TILL, -owed)
    move(session, order["customer"], owed)
    eda.emit("order.refunded", order, key=order["order"])


@eda.on("#", name="market.audit")
def audit(session: Session, event: Event) -> None:
    session.execute(insert(effects).values(name=f"@{event.id}", number=1))


@eda.on("order.#", name="market.story", ordered=True)
def story(session: Session, event: Event) -> None:
    """The events of each order, in their order."""
    session.execute(insert(effects).values(name=f"{event.type}", number=event.data["order"]))


@eda.projection("order.*", table=copies, name="market.copy")
def copy(row: Mapping[str, Any] | None, event: Event) -> Mapping[str, Any]:
    return {
        "state": event.type,
        "price": event.data["price"],
        "seen": 1 + (row["seen"] if row else 0),
    }


def open_for_business() -> None:
    metadata.create_all(eda.databases.engine)
    with eda.databases.engine.begin() as connection:
        if not connection.execute(select(accounts)).all():
            opening = {**dict.fromkeys(CUSTOMERS, OPENING), TILL: 0, SHELF: PORTIONS}
            rows = [{"id": id_, "visits": amount} for id_, amount in opening.items()]
            connection.execute(insert(accounts), rows)


if __name__ == "__main__":
    seed, last = map(int, sys.argv[1:])
    open_for_business()
    chance = random.Random(seed)
    for number in range(last):
        try:
            place(1000 * seed + number, chance.choice(CUSTOMERS))
        except DBAPIError:  # the database is away: nobody knows whether that one is placed
            eda.databases.engine.dispose()
