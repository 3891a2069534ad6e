"""Trade on many accounts: ``python -m tests.faults.programs.trading TRADES ACCOUNTS SEED``.

Each transaction trades on up to four accounts, whose rows it locks, so that the accounts count
their trades in the order of the commits. Every tenth is undone.
"""

from __future__ import annotations

import random
import sys

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from tests.faults.programs.order_system import eda, trade
from tests.faults.programs.tables import accounts


class ChangedMyMind(Exception):
    """Undoes a transaction."""


def trade_on(session: Session, account: int) -> None:
    counted = update(accounts).where(accounts.c.id == account)
    session.execute(counted.values(visits=accounts.c.visits + 1))
    number = session.scalar(select(accounts.c.visits).where(accounts.c.id == account))
    trade.delay(account, number)


def produce(trades: int, among: int, chance: random.Random) -> None:
    done = 0
    while done < trades:
        chosen = sorted(chance.sample(range(among), min(among, chance.randint(1, 4))))
        try:
            with eda.transaction() as session:
                for account in chosen:
                    trade_on(session, account)
                if chance.random() < 0.1:
                    raise ChangedMyMind
        except ChangedMyMind:
            continue
        done += len(chosen)


if __name__ == "__main__":
    produce(int(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3])))
