"""A customer who orders repeatedly, and writes each result to a diary.

``python -m example_project.demo.customers ORDERS SECONDS SEED DIARY``: *ORDERS* orders in about
*SECONDS* seconds. One in five is rolled back after it was published.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from example_project.customer import ChangedMind, buy
from example_project.order import MENU
from example_project.payment import CUSTOMERS

CHANGES_OF_MIND = 0.2
READY = "at the counter"


@dataclass(frozen=True)
class Told:
    """The ids of committed and of rolled-back orders, according to the customers."""

    placed: frozenset[str]
    rolled_back: frozenset[str]


def order_again_and_again(orders: int, seconds: float, seed: str, diary: Path) -> None:
    """Place *orders* orders, and write each result to *diary* at once."""
    chance = random.Random(seed)
    print(READY, flush=True)
    with diary.open("a", buffering=1) as notes:
        for _ in range(orders):
            time.sleep(chance.uniform(0, 2 * seconds / orders))
            customer, drink = chance.choice(CUSTOMERS), chance.choice(list(MENU))
            changes_mind = chance.random() < CHANGES_OF_MIND
            try:
                print("placed", buy(customer, drink, changes_mind=changes_mind), file=notes)
            except ChangedMind as changed:
                print("rolled_back", changed.order_id, file=notes)


def read(folder: Path) -> Told:
    """The results in all diaries in *folder*."""
    notes = [
        line.split() for diary in folder.glob("*.diary") for line in diary.read_text().splitlines()
    ]
    return Told(
        frozenset(order_id for answer, order_id in notes if answer == "placed"),
        frozenset(order_id for answer, order_id in notes if answer == "rolled_back"),
    )


if __name__ == "__main__":
    _, _orders, _seconds, _seed, _diary = sys.argv
    order_again_and_again(int(_orders), float(_seconds), _seed, Path(_diary))
