"""Place orders, each in its own transaction.

``python -m tests.faults.programs.place_orders FIRST LAST``

Every third order is undone after it was published. After a crash the same command is given again:
an order that is there already was committed.
"""

from __future__ import annotations

import sys

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from tests.faults.programs.order_system import charge, eda
from tests.faults.programs.tables import orders


def produce(first: int, last: int) -> None:
    with Session(eda.databases.engine) as session:
        there = set(session.scalars(select(orders.c.number)))
    for number in range(first, last + 1):
        if number not in there:
            place(number)


def place(number: int) -> None:
    try:
        with eda.transaction() as session:
            session.execute(insert(orders).values(number=number))
            charge.delay(number)
            if number % 3 == 0:
                raise LookupError("changed our mind")
    except LookupError:
        pass


if __name__ == "__main__":
    produce(int(sys.argv[1]), int(sys.argv[2]))
