"""A day of the shop: ``python -m example_project.broker_topology``.

Customers place twenty orders; stock runs out after the last ones were paid. Then a loyalty service
joins, catches up from the stored events, and continues with the orders that follow.

The last line is one JSON object. The exit code is 0 only if every order came to an end, no money
is missing, and the points equal the payments.
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

from example_project.demo.processes import Failed
from example_project.town import Town, wait_until

PACKAGE = "example_project.broker_topology"
SERVICES = ("order", "payment", "kitchen", "delivery")
ORDERS, LATER = 20, 4
DRINK = "hot chocolate"


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
    return 0 if figures["points"] == figures["paid"] and not figures["missing"] else 1


def tell(town: Town) -> dict[str, Any]:
    """Sell until stock runs out, let the loyalty service join, and sell the other drink."""
    _open(town, *SERVICES)
    from example_project.broker_topology import kitchen, order, payment

    customers = payment.CUSTOMERS
    for number in range(ORDERS):
        order.place(customers[number % len(customers)], DRINK)
    wait_until(lambda: _ended(order) == ORDERS, "every order delivered or discarded")
    print(f"{ORDERS} orders, {kitchen.OPENING_STOCK} portions: {dict(_states(order))}")

    _open(town, "loyalty")
    from example_project.broker_topology import loyalty

    queue = "eda.on.loyalty.loyalty.count"
    town.command("payment", "events", "replay", "--to", queue, "--yes")
    for number in range(LATER):
        order.place(customers[number % len(customers)], "white chocolate")
    wait_until(lambda: _ended(order) == ORDERS + LATER, "every order delivered or discarded")
    paid = _paid(payment)
    wait_until(lambda: _points(loyalty) == paid, "the points of all payments")
    print(f"loyalty joined later, and has a point for each of the {paid} cents paid")

    states = _states(order)
    sold = kitchen.OPENING_STOCK * order.MENU[DRINK] + LATER * order.MENU["white chocolate"]
    return {
        "delivered": states["delivered"],
        "discarded": states["discarded"],
        "paid": paid,
        "points": _points(loyalty),
        "missing": sold - paid,
    }


def _open(town: Town, *services: str) -> None:
    """Create tables and queues of *services*: from then on their queues collect events."""
    town.open(services)
    for name in services:
        town.command(name, "subscriptions", "declare")


def _states(order: Any) -> Counter[str]:
    with Session(order.eda.databases.engine) as session:
        return Counter(session.scalars(select(order.Order.state)))


def _ended(order: Any) -> int:
    states = _states(order)
    return states["delivered"] + states["discarded"]


def _paid(payment: Any) -> int:
    """The cents missing from the accounts."""
    with Session(payment.eda.databases.engine) as session:
        left = session.scalar(select(func.sum(payment.Account.balance))) or 0
    return int(len(payment.CUSTOMERS) * payment.OPENING_BALANCE - left)


def _points(loyalty: Any) -> int:
    with Session(loyalty.eda.databases.engine) as session:
        return int(session.scalar(select(func.sum(loyalty.Points.points))) or 0)


if __name__ == "__main__":
    sys.exit(main())
