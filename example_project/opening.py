"""Opens the shop: creates the services' tables and fills menu, accounts and stock.

``python -m example_project.opening``; a second run resets money and stock.
"""

from __future__ import annotations

from example_project import delivery, kitchen, order, payment


def open_shop() -> None:
    """Open every service in its own database."""
    for service in (order, payment, kitchen, delivery):
        service.open_for_business()


if __name__ == "__main__":
    open_shop()
    print("The shop is open.")
