"""Counts the effects of every order in the services' databases.

An effect is a row that is never updated, in a table without a unique constraint, so an effect that
happened twice is found twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Select, create_engine, func, select

from celery_eda import Tables
from example_project.delivery import Delivery
from example_project.demo.customers import Told
from example_project.kitchen import Cup
from example_project.order import Order, Progress
from example_project.payment import Charge

#: The effects that every committed order must have exactly once: service and query.
EFFECTS: Mapping[str, tuple[str, Select[tuple[str]]]] = {
    "charged": ("payment", select(Charge.order_id)),
    "made": ("kitchen", select(Cup.order_id)),
    "delivered": ("delivery", select(Delivery.order_id)),
    "closed": ("order", select(Progress.order_id).where(Progress.state == "delivered")),
}


@dataclass(frozen=True)
class Fault:
    """An order with a missing, duplicated or phantom effect.

    Attributes:
        kind: ``lost``: a committed order lacks the effect, or is missing itself although its
            customer saw the commit. ``duplicated``: it has the effect more than once.
            ``phantom``: an order that was not committed has the effect, or exists.
        order: the id of the order.
        effect: one of ``EFFECTS``, or ``placed``.
        times: the number of missing or surplus effects.
    """

    kind: str
    order: str
    effect: str
    times: int

    def __str__(self) -> str:
        return f"{self.kind}: order {self.order} {self.effect}, {self.times} time(s)"


@dataclass(frozen=True)
class Verdict:
    """The result of the count.

    Attributes:
        published: orders committed.
        rolled_back: orders published, then rolled back.
        effects: number of rows by name of the effect.
        faults: violations of the promise.
    """

    published: int
    rolled_back: int
    effects: Mapping[str, int]
    faults: Sequence[Fault]

    def count(self, kind: str) -> int:
        """The number of effects that are ``lost``, ``duplicated`` or ``phantom``."""
        return sum(each.times for each in self.faults if each.kind == kind)


class Books:
    """Read access to the four databases."""

    def __init__(self, databases: Mapping[str, str]) -> None:
        self._engines = {service: create_engine(url) for service, url in databases.items()}

    def orders(self) -> set[str]:
        """The ids of the committed orders."""
        return set(self._read("order", select(Order.id)))

    def effects(self) -> dict[str, Counter[str]]:
        """The number of rows per order, for each effect."""
        return {
            name: Counter(self._read(service, query)) for name, (service, query) in EFFECTS.items()
        }

    def waiting(self) -> int:
        """The number of messages in all outboxes."""
        query = select(func.count()).select_from(Tables.on().outbox)
        return sum(self._read(service, query)[0] for service in self._engines)

    def dead(self) -> list[tuple[str, str]]:
        """Lines with the task and reason of every dead letter."""
        table = Tables.on().dead_letters
        query = select(table.c.task + ": " + table.c.reason)
        return [(each, text) for each in self._engines for text in self._read(each, query)]

    def judge(self, told: Told) -> Verdict:
        """Count the effects, and compare them with the customers' diaries."""
        orders, effects = self.orders(), self.effects()
        faults = [Fault("lost", order, "placed", 1) for order in told.placed - orders]
        faults += [Fault("phantom", order, "placed", 1) for order in told.rolled_back & orders]
        for name, found in effects.items():
            faults += [Fault("lost", order, name, 1) for order in orders - found.keys()]
            for order, rows in found.items():
                if order not in orders:
                    faults.append(Fault("phantom", order, name, rows))
                elif rows > 1:
                    faults.append(Fault("duplicated", order, name, rows - 1))
        rows = {name: found.total() for name, found in effects.items()}
        return Verdict(len(orders), len(told.rolled_back), rows, faults)

    def _read(self, service: str, query: Select[tuple[str]]) -> list[str]:
        with self._engines[service].connect() as connection:
            return list(connection.scalars(query))
