"""Places one order: ``python -m example_project.customer ada "hot chocolate"``.

With ``--change-mind`` the customer leaves the counter after the order was published.
"""

from __future__ import annotations

import argparse

from example_project import order


class ChangedMind(Exception):
    """The customer left; the transaction of the order is rolled back."""

    def __init__(self, order_id: str) -> None:
        super().__init__(f"order {order_id} was rolled back")
        self.order_id = order_id


def buy(customer: str, drink: str, *, changes_mind: bool = False) -> str:
    """Place an order in a transaction of its own.

    Returns:
        The id of the committed order.

    Raises:
        ChangedMind: the order was published and then rolled back.
    """
    with order.eda.transaction() as session:
        order_id = order.place(session, customer, drink)
        if changes_mind:
            raise ChangedMind(order_id)
    return order_id


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Place one order.")
    parser.add_argument("customer")
    parser.add_argument("drink")
    parser.add_argument("--change-mind", action="store_true", help="roll back after publishing")
    given = parser.parse_args()
    try:
        print("placed", buy(given.customer, given.drink, changes_mind=given.change_mind))
    except ChangedMind as changed:
        print(changed)
