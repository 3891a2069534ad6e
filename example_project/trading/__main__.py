"""Places a bulk of trades, one of them malformed: ``python -m example_project.trading``.

The repairer corrects the malformed trade; with ``--by-hand`` the commands of
``celery -A … eda dead-letters`` do. The last line is one JSON object. The exit code is 0 only if
every account's trades took effect once, in order.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

from sqlalchemy import create_engine, select

from example_project.demo import processes
from example_project.demo.broker import PrivateBroker
from example_project.demo.processes import PROJECT, Failed, Process, python
from example_project.trading.desk import Trade

APP = "example_project.trading.desk"
ACCOUNTS = ("A", *(f"account {number}" for number in range(1, 25)))
TRADES = 4
MALFORMED = ("A", 2, "CHOC", "1OO")
PATIENCE = 40.0
PLACE = f"""
import sys, json
from {APP} import open_desk, place
open_desk()
place([tuple(each) for each in json.load(sys.stdin)])
"""


def main() -> int:
    """Run the story in a temporary folder, which is kept if it fails."""
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="celery-eda-trades-"))
    try:
        with ExitStack() as ends:
            figures = tell(_opened(folder, ends, by_hand=options.by_hand), options.by_hand)
    except Failed as failed:
        print(failed, file=sys.stderr)
        print(f"The database and the logs are kept in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(json.dumps(figures))
    return 0 if figures["in_order"] and figures["executed"] == figures["placed"] else 1


class Desk:
    """The processes, database and command line of the desk."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.engine = create_engine(environment["SHOP_TRADING_DATABASE"])
        self._folder = folder

    def command(self, *words: str, given: str | None = None) -> str:
        """Run a command; returns its output.

        Raises:
            Failed: the command exited with an error.
        """
        done = subprocess.run(
            [sys.executable, *words],
            cwd=PROJECT,
            env=self.environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode:
            raise Failed(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def eda(self, *words: str) -> str:
        """Run ``celery -A … eda`` with *words*."""
        return self.command("-m", "celery", "-A", APP, "eda", *words)

    def work(self) -> Iterator[Process]:
        """Start a worker for the trades, with a relay beside it, and one for the repairs."""
        name = self.environment["SHOP_NAME"]
        for queue in (f"{name}.trading", f"{name}.trading.repair"):
            words = ("worker", "-c2", "-l", "INFO", "-n", f"{queue}@%h", "-Q", queue)
            command = python("celery", "-A", APP, *words)
            yield Process(queue, command, self.environment, self._folder / f"{queue}.log")

    def executed(self) -> dict[str, list[int]]:
        """The numbers of each account's trades, in the order of their effects."""
        query = select(Trade.account, Trade.number).order_by(Trade.account, Trade.id)
        with self.engine.connect() as connection:
            rows = connection.execute(query).all()
        return {
            account: [row.number for row in trades]
            for account, trades in groupby(rows, key=lambda row: str(row.account))
        }

    def wait(self, until: Callable[[dict[str, list[int]]], bool], what: str) -> float:
        """Wait until the executed trades are as expected; returns the seconds waited.

        Raises:
            Failed: the trades differ after the timeout.
        """
        began = time.monotonic()
        while not until(self.executed()):
            if time.monotonic() > began + PATIENCE:
                raise Failed(f"not in {PATIENCE:g} s: {what}; executed: {self.executed()}")
            time.sleep(0.1)
        return time.monotonic() - began


def tell(desk: Desk, by_hand: bool) -> dict[str, object]:
    """Place the trades, check which accounts wait, and repair the malformed trade."""
    orders = [
        MALFORMED if (account, number) == MALFORMED[:2] else (account, number, "CHOC", "100")
        for number in range(1, TRADES + 1)
        for account in ACCOUNTS
    ]
    desk.command("-c", PLACE, given=json.dumps(orders))
    print(f"{len(orders)} trades placed for {len(ACCOUNTS)} accounts, A's second is {MALFORMED}")
    others = ACCOUNTS[1:]
    seconds = desk.wait(
        lambda executed: all(len(executed.get(each, ())) == TRADES for each in others),
        "the trades of the other accounts",
    )
    print(f"all trades of the other {len(others)} accounts executed in {seconds:.1f} s")
    if by_hand:
        mend(desk)
    desk.wait(lambda executed: len(executed.get("A", ())) == TRADES, "the trades of A")
    executed = desk.executed()
    print(f"A's trades took effect in the order {executed['A']}")
    return {
        "placed": len(orders),
        "executed": sum(map(len, executed.values())),
        "in_order": all(numbers == sorted(set(numbers)) for numbers in executed.values()),
        "mended_by": "a person" if by_hand else "the repairer",
    }


def mend(desk: Desk) -> None:
    """Act as a person: list, edit, redrive."""
    desk.wait(lambda executed: executed.get("A") == [1], "A's first trade alone")
    print(f"A waits: {desk.executed()['A']} executed. A person looks:")
    print(desk.eda("dead-letters", "list", "--state", "open"))
    listed = json.loads(desk.eda("dead-letters", "list", "--state", "open", "--json"))
    number = str(listed["letters"][0]["id"])
    corrected = json.dumps([*MALFORMED[:3], "100"])
    print(desk.eda("dead-letters", "edit", number, "--args", corrected, "--why", "typing error"))
    print(desk.eda("dead-letters", "redrive", number, "--why", "mended"))


def _opened(folder: Path, ends: ExitStack, *, by_hand: bool) -> Desk:
    broker = PrivateBroker(folder / "broker")
    ends.callback(processes.end, [broker.process])
    broker.wait_until_ready()
    environment = {
        **os.environ,
        "SHOP_BROKER": broker.url,
        "SHOP_NAME": "bulk",
        "SHOP_TRADING_DATABASE": f"sqlite:///{folder / 'trading.db'}",
        "DESK_REPAIRER": "off" if by_hand else "on",
    }
    desk = Desk(folder, environment)
    desk.eda("db", "upgrade")
    staff: Sequence[Process] = list(desk.work())
    ends.callback(processes.end, staff)
    return desk


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m example_project.trading", description=__doc__)
    parser.add_argument("--by-hand", action="store_true", help="a person mends it, not a repairer")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
