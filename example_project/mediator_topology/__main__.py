"""A day of the shop: ``python -m example_project.mediator_topology``.

Customers place twenty orders; stock runs out before the last ones are made. Then the barista is
absent: two orders wait until the manager decides, once to try again and once to give up. Then the
barista is back.

The last line is one JSON object. The exit code is 0 only if every order came to an end, no money
is missing, and every customer was notified.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from celery_eda.sagas.record import Kind, Status
from example_project.demo.processes import Failed
from example_project.town import PATIENCE, Town, wait_until

PACKAGE = "example_project.mediator_topology"
SERVICES = ("order", "payment", "kitchen", "delivery", "notification")
#: Few concurrent orders; with more, a slow machine would time out and ask the manager.
ORDERS, LATER, AT_ONCE = 20, 2, 5
DRINK, OTHER = "hot chocolate", "white chocolate"


def main() -> int:
    """Run the story in a temporary folder, which is kept if it fails."""
    folder = Path(tempfile.mkdtemp(prefix="celery-eda-shop-"))
    try:
        with ExitStack() as ends:
            figures = tell(Town(folder, ends, PACKAGE))
    except Failed as failed:
        print(failed, file=sys.stderr)
        print(f"The databases and the logs are kept in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(json.dumps(figures))
    return 0 if not figures["missing"] and figures["apologies"] == figures["discarded"] else 1


def tell(town: Town) -> dict[str, Any]:
    """Sell until stock runs out, and twice while the barista is absent."""
    town.open(SERVICES)
    from example_project.mediator_topology import kitchen, notification, order, payment

    for name, worker in town.workers.items():
        wait_until(lambda worker=worker: worker.has_said(" ready."), f"{name} to be open")
    customers = payment.CUSTOMERS
    for number in range(ORDERS):
        wait_until(lambda number=number: number - _ended(order) < AT_ONCE, "an order's end")
        order.place(customers[number % len(customers)], DRINK)
    wait_until(lambda: _ended(order) == ORDERS, "every order delivered or discarded")
    print(f"{ORDERS} orders, {kitchen.OPENING_STOCK} portions: {dict(_states(order))}")

    barista = town.workers["kitchen"]
    barista.terminate()
    barista.wait(PATIENCE)
    again, given_up = (order.place(customers[0], OTHER) for _ in range(2))
    for number in (again, given_up):
        wait_until(lambda number=number: _asks(order, number), "the manager to be asked")
    print("the barista is absent, and the manager is asked about two orders")
    for number, decision in ((again, "again"), (given_up, "give up")):
        words = ("signal", f"order {number}", "manager", "--value", json.dumps(decision))
        town.command("order", "sagas", *words)
    barista.start()
    wait_until(lambda: _ended(order) == ORDERS + 2, "the end of both")
    for number in range(LATER):
        order.place(customers[number % len(customers)], OTHER)
    wait_until(lambda: _ended(order) == ORDERS + 2 + LATER, "every order delivered or discarded")
    print(f"the barista is back: {dict(_states(order))}")

    states = _states(order)
    sold = kitchen.OPENING_STOCK * order.MENU[DRINK] + (LATER + 1) * order.MENU[OTHER]
    paid = _paid(payment)
    return {
        "delivered": states["delivered"],
        "discarded": states["discarded"],
        "paid": paid,
        "missing": sold - paid,
        "apologies": _apologies(notification),
        "wasted": _wasted(kitchen),
    }


def _states(order: Any) -> Counter[str]:
    with Session(order.eda.databases.engine) as session:
        return Counter(session.scalars(select(order.Order.state)))


def _ended(order: Any) -> int:
    """The orders whose sagas have ended, late effects compensated."""
    sagas = order.eda.databases.tables.sagas
    with Session(order.eda.databases.engine) as session:
        ends = Counter(session.scalars(select(sagas.c.state)))
    return ends["completed"] + ends["compensated"]


def _asks(order: Any, number: int) -> bool:
    """True if the saga of an order waits for the manager."""
    with order.eda.databases.engine.connect() as connection:
        records = order.eda.sagas.coordinator.store.records(connection, f"order {number}")
    return any(each.kind is Kind.wait and each.status is Status.open for each in records)


def _paid(payment: Any) -> int:
    """The cents missing from the accounts."""
    with Session(payment.eda.databases.engine) as session:
        left = session.scalar(select(func.sum(payment.Account.balance))) or 0
    return int(len(payment.CUSTOMERS) * payment.OPENING_BALANCE - left)


def _apologies(notification: Any) -> int:
    note = notification.Note
    with Session(notification.eda.databases.engine) as session:
        query = select(func.count()).select_from(note).where(note.text == "we are sorry")
        return int(session.scalar(query) or 0)


def _wasted(kitchen: Any) -> int:
    with Session(kitchen.eda.databases.engine) as session:
        return int(session.scalar(select(func.sum(kitchen.Stock.wasted))) or 0)


if __name__ == "__main__":
    sys.exit(main())
