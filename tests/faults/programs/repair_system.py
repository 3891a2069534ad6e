"""The system under fault with trades in order per account, of which some have to be mended.

``ROAD_REPAIRER`` says whether somebody does so; a trade that finds the file ``broken`` fails too.
"""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from celery_eda import Failure
from celery_eda.dead_letters.failure import RepairDecision
from tests.faults.programs.order_system import app as app  # what `celery -A` looks for
from tests.faults.programs.order_system import eda
from tests.faults.programs.tables import effects


class Malformed(ValueError):
    """A trade that cannot be done as it is."""


@eda.task(name="road.deal", key="account")
def trade(session: Session, account: int, number: Any) -> None:
    """Takes effect with its number, unless that is none."""
    written = number if isinstance(number, int) else 0
    session.execute(insert(effects).values(name=f"account {account}", number=written))
    if written != number:
        raise Malformed(f"{number} is no number")


@eda.task(name="road.brittle")
def brittle(session: Session, number: int) -> None:
    session.execute(insert(effects).values(name="brittle", number=number))
    if os.path.exists(os.path.join(os.environ["ROAD_FOLDER"], "broken")):
        raise RuntimeError("out of order")


@eda.task(name="road.login")
def login(session: Session, user: str, password: str, *, api_key: str, url: str) -> None:
    """Tells everything that it knows."""
    session.execute(insert(effects).values(name="login", number=0))
    raise PermissionError(f"{password} of {user} not accepted at {url}, api_key: {api_key}")


if os.environ.get("ROAD_REPAIRER") == "mends":

    @eda.repairs(trade, on=Malformed)
    def mend(session: Session, failure: Failure) -> RepairDecision:
        session.execute(insert(effects).values(name="mended", number=1))
        return failure.resubmit(number=int(failure.arguments["number"])).because("a text")


if os.environ.get("ROAD_REPAIRER") == "despairs":

    @eda.repairs(brittle)
    def despair(failure: Failure) -> RepairDecision:
        return failure.resubmit()
