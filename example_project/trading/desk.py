"""The trading desk: executes the trades of each account in the order in which they were placed.

A malformed trade blocks only its own account. A repairer corrects the known mistakes; without it
(``DESK_REPAIRER=off``) a person does the same with ``eda dead-letters``.
"""

from __future__ import annotations

import os

from celery import Celery
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_eda import EDA, Failure, RepairDecision
from example_project import settings

app = Celery("trading")
app.config_from_object(settings)
app.conf.update(
    eda_database_url=settings.database_of("trading"),
    # Repairs have a queue and a worker of their own, so they never delay the trades.
    eda_repair_queue=settings.queue_of("trading.repair"),
    eda_embedded_relay=True,
    task_routes={"trading.*": {"queue": settings.queue_of("trading")}},
)
eda = EDA(app)


class Base(DeclarativeBase):
    type_annotation_map = {str: String(60)}  # noqa: RUF012  # as SQLAlchemy wants it


class Trade(Base):
    """An executed trade; ``id`` gives the order of the effects."""

    __tablename__ = "trades"

    id: Mapped[int] = mapped_column(primary_key=True)
    account: Mapped[str]
    number: Mapped[int]
    symbol: Mapped[str]
    shares: Mapped[int]


@eda.task(name="trading.execute", key="account")
def execute(session: Session, account: str, number: int, symbol: str, shares: str) -> None:
    """Execute a trade. The text *shares* must be a number."""
    session.add(Trade(account=account, number=number, symbol=symbol, shares=int(shares)))


def correct(failure: Failure) -> RepairDecision:
    """Correct a typing error: the letter O in place of a zero."""
    typed = failure.arguments["shares"]
    mended = typed.upper().replace("O", "0")
    if mended.isdigit():
        return failure.resubmit(shares=mended).because(f"{typed} can only mean {mended}")
    return failure.leave(f"{typed} could mean anything")


if os.environ.get("DESK_REPAIRER") != "off":
    eda.repairs(execute, on=ValueError)(correct)


def place(orders: list[tuple[str, int, str, str]]) -> None:
    """Place a bulk of trades in one transaction: all or none."""
    with eda.transaction():
        for account, number, symbol, shares in orders:
            execute.delay(account, number, symbol, shares)


def open_desk() -> None:
    """Create the desk's table."""
    Base.metadata.create_all(eda.databases.engine)
