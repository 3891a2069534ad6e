"""The road's system with events: ``python -m tests.faults.programs.event_system FIRST LAST``.

Each order is placed and paid in one transaction of its own, with an event for each; every third
is undone.
"""

from __future__ import annotations

import os
import sys

from celery import current_task
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from celery_eda import Event, RetryPolicy
from tests.faults.programs.order_system import app, charge, eda
from tests.faults.programs.tables import effects, orders

__all__ = ["app", "eda"]
#: Customers, whose events come in order.
CUSTOMERS = 3


def note(session: Session, name: str, number: int) -> None:
    session.execute(insert(effects).values(name=name, number=number))


@eda.on("order.*", name="road.audit")
def audit(session: Session, event: Event) -> None:
    """Wants every event of an order."""
    note(session, event.type, event.data["number"])


@eda.on("order.placed", name="road.kitchen", policy=RetryPolicy(attempts=3, first=0.1))
def kitchen(session: Session, event: Event) -> None:
    """Fails the first time; emits and publishes in the transaction that handles the event."""
    number = event.data["number"]
    note(session, "cooked", number)
    charge.delay(number)
    eda.emit("kitchen.cooked", {"number": number, "because": event.correlation_id})
    if _first_time(f"kitchen{number}"):
        raise ConnectionError("the oven is cold")


@eda.on("order.placed", name="road.broken")
def broken(session: Session, event: Event) -> None:
    """Fails for good after it wrote, as long as it is broken."""
    note(session, "mended", event.data["number"])
    if os.environ.get("ROAD_MENDED") != "1":
        raise ValueError("broken")


@eda.on("order.paid", "order.placed", name="road.ledger", ordered=True)
def ledger(session: Session, event: Event) -> None:
    """Sees the events of a customer in their order; of some it is not told."""
    kind = 0 if event.type == "order.placed" else 1
    note(session, f"ledger {event.key}", 2 * event.data["number"] + kind)


@eda.on("weather.*", name="road.cache", every_worker=True)
def forget(event: Event) -> None:
    """Writes down what this worker has been told; like a cache, it knows no database."""
    node = current_task.request.hostname.partition("@")[0]
    with open(os.path.join(os.environ["ROAD_FOLDER"], f"told {node}"), "a") as told:
        told.write(f"{event.data['number']}\n")


def place(number: int) -> None:
    customer = number % CUSTOMERS
    try:
        with eda.transaction() as session:
            session.execute(insert(orders).values(number=number))
            eda.emit("order.placed", {"number": number}, key=customer)
            eda.emit("order.looked.at", {"number": number}, key=customer)
            eda.emit("order.paid", {"number": number}, key=customer)
            eda.emit("weather.changed", {"number": number})
            if number % 3 == 0:
                raise LookupError("changed our mind")
    except LookupError:
        pass


def _first_time(what: str) -> bool:
    try:
        with open(os.path.join(os.environ["ROAD_FOLDER"], what), "x"):
            return True
    except FileExistsError:
        return False


if __name__ == "__main__":
    with Session(eda.databases.engine) as reading:
        there = set(reading.scalars(select(orders.c.number)))
    for each in range(int(sys.argv[1]), int(sys.argv[2]) + 1):
        if each not in there:
            place(each)
