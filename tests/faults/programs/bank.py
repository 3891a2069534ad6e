"""A bank whose transfers are sagas: ``python -m tests.faults.programs.bank LAST``.

Each transfer takes 1 from account 1 and gives it to account 2; every third one cannot be given, and
every fourth waits for a decision that nobody takes, so that time does.
"""

from __future__ import annotations

import sys

from celery.exceptions import Ignore
from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from celery_eda.sagas.steps import Steps
from tests.faults.programs.order_system import app, eda
from tests.faults.programs.tables import accounts, effects

__all__ = ["app", "eda"]


def move(session: Session, name: str, account: int, amount: int, number: int) -> None:
    here = update(accounts).where(accounts.c.id == account)
    session.execute(here.values(visits=accounts.c.visits + amount))
    session.execute(insert(effects).values(name=name, number=number))


@eda.task(name="bank.take")
def take(session: Session, number: int) -> str:
    move(session, "take", 1, -1, number)
    return "taken"


@eda.task(name="bank.give_back")
def give_back(session: Session, number: int) -> None:
    move(session, "give back", 1, 1, number)


@eda.task(name="bank.give")
def give(session: Session, number: int) -> None:
    if number % 3 == 0:
        raise Ignore("the account is closed")
    move(session, "give", 2, 1, number)


@eda.task(name="bank.tell")
def tell(session: Session, number: int) -> None:
    session.execute(insert(effects).values(name="tell", number=number))


def number_of(data):  # type: ignore[no-untyped-def]
    return {"number": data["number"]}


@eda.saga("transfer")
def transfer(steps: Steps) -> None:
    steps.step("take", take, undo=give_back, give=number_of)
    with steps.parallel():
        with steps.branch():
            steps.step("give", give, give=number_of)
        with steps.branch():
            steps.step("tell", tell, give=number_of)
    with steps.when(lambda data: data["number"] % 4 == 0):
        steps.wait_for("approved", timeout=1, default=True)
    steps.pivot()


if __name__ == "__main__":
    with eda.databases.engine.begin() as connection:
        if not connection.execute(select(accounts)).all():
            connection.execute(insert(accounts), [{"id": n, "visits": 100} for n in (1, 2)])
    for number in range(1, int(sys.argv[1]) + 1):
        transfer.start({"number": number}, id=f"transfer {number}")
