"""Runs the shop, kills its processes while customers order, and counts the effects of each order.

``python -m example_project.demo``; ``--help`` lists the options. The exit code is 0 only if every
committed order took effect exactly once and no other order did.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from example_project import settings
from example_project.demo import processes
from example_project.demo.broker import PrivateBroker
from example_project.demo.faults import Faults
from example_project.demo.judge import Books, Verdict
from example_project.demo.processes import Failed
from example_project.demo.shop import RELAYS, WORKERS, Shop

#: Seconds within which a slow machine has to complete all orders after the last one.
PATIENCE = 60.0
#: Seconds within which a broker redelivers: Redis after its visibility timeout, others at once.
LAST_COPIES = {True: settings.broker_transport_options["visibility_timeout"] + 2, False: 2}
SECONDS_BETWEEN_LINES = 2.0
#: The number of faults that are listed individually.
LONGEST_LIST = 20

Say = Callable[[str], None]


def main() -> int:
    """Run the demo in a temporary folder, which is kept if it fails."""
    options = _options()
    # Log records about processes that the demo itself kills would only distract.
    logging.getLogger("celery_eda").addHandler(logging.NullHandler())
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    folder = Path(tempfile.mkdtemp(prefix="celery-eda-demo-"))
    code = 1
    try:
        code = 0 if not run(options, folder, _teller(silent=options.json)).faults else 1
    except Failed as failed:
        print(failed, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print("Interrupted: all processes are ended, nothing was counted.", file=sys.stderr)
    except SystemExit:
        shutil.rmtree(folder)
        raise
    if code == 1:
        print(f"The databases and logs are kept in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return code


def run(options: argparse.Namespace, folder: Path, say: Say) -> Verdict:
    """Start the shop and its customers, inject faults, wait, stop, count. No process is left.

    Raises:
        Failed: the shop could not be run.
    """
    say(
        f"The hot-chocolate shop: {options.orders} orders in {options.seconds:g} s, "
        f"about 1 in 5 rolled back, --seed {options.seed}"
    )
    with ExitStack() as ends:
        broker, is_ours = None, True
        if url := os.environ.get("SHOP_BROKER"):
            is_ours = False
            say("broker: that of SHOP_BROKER, so it is not killed")
        elif options.broker == "embedded":
            url = f"eda+sqlite:///{folder / 'broker.db'}"
            say(f"broker: no server, one SQLite file between the services, {url}")
        else:
            broker = PrivateBroker(folder / "broker")
            ends.callback(processes.end, [broker.process])
            broker.wait_until_ready()
            url = broker.url
            say(f"broker: {broker.program.name}, appendfsync always, {url}")
        shop = Shop(url, folder)
        ends.callback(shop.close if is_ours else shop.close_and_remove_queues)
        faults = Faults(shop, broker, random.Random(options.seed))
        books = Books(shop.databases)
        shop.make_tables()
        if books.orders():
            raise Failed("The databases hold orders of an earlier run. Name empty ones.")
        say(f"databases: {', '.join(shop.databases)}, each its own")
        shop.open()
        say(f"staff: {len(WORKERS)} workers with 2 processes each, {len(RELAYS)} relays")
        shop.let_in(options.orders, options.seconds, options.seed)
        trade(shop, faults, books, options.seconds, say)
        wait_until_served(shop, books, say)
    verdict = books.judge(shop.told())
    if not verdict.published:
        raise Failed("No order was placed, so nothing is proved.")
    tell(verdict, faults, books.dead(), say)
    return verdict


def trade(shop: Shop, faults: Faults, books: Books, seconds: float, say: Say) -> None:
    """Inject faults until the last customer has left."""
    opened = next_line = time.monotonic()
    strikes = faults.plan()
    while shop.is_trading() or strikes:
        while strikes and time.monotonic() > opened + strikes[0][0] * seconds:
            say(f"  * {strikes.pop(0)[1]()}")
        supervise(shop, say)
        if time.monotonic() > next_line:
            say(_standing(books))
            next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        time.sleep(0.05)
    say("the last customer has ordered")


def wait_until_served(shop: Shop, books: Books, say: Say) -> None:
    """Wait until all orders are completed, or a timeout; then for the last redeliveries."""
    next_line = time.monotonic()
    give_up = next_line + PATIENCE
    while books.waiting() or books.effects()["closed"].keys() < books.orders():
        if time.monotonic() > give_up:
            say(f"not everybody was served in {PATIENCE:g} s")
            return
        supervise(shop, say)
        if time.monotonic() > next_line:
            say(_standing(books))
            next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        time.sleep(0.2)
    seconds = LAST_COPIES[shop.broker.startswith("redis")]
    say(f"everybody is served; copies still under way would arrive in the next {seconds} s")
    time.sleep(seconds)


def supervise(shop: Shop, say: Say) -> None:
    """Restart processes that exited on their own."""
    for name in shop.supervise():
        say(f"  ! {name} ended by itself; started again")


def tell(verdict: Verdict, faults: Faults, dead: list[tuple[str, str]], say: Say) -> None:
    """Print the verdict; the last line is JSON."""
    for letter in sorted(set(dead)):
        say(f"{dead.count(letter)} dead letters of {': '.join(letter)}")
    say(
        f"{verdict.published} orders committed, {verdict.rolled_back} rolled back, "
        f"{faults.kills} processes killed, broker restarted {faults.broker_restarts} time(s)"
    )
    for name, rows in verdict.effects.items():
        say(f"  {name:9} {rows:5} times for {verdict.published} orders")
    for fault in verdict.faults[:LONGEST_LIST]:
        say(f"  {fault}")
    counts = {kind: verdict.count(kind) for kind in ("lost", "duplicated", "phantom")}
    say(", ".join(f"{times} {kind}" for kind, times in counts.items()))
    figures = {
        "published": verdict.published,
        "rolled_back": verdict.rolled_back,
        "effects": sum(verdict.effects.values()),
        **counts,
        "kills": faults.kills,
        "broker_restarts": faults.broker_restarts,
    }
    print(json.dumps(figures), flush=True)


def _standing(books: Books) -> str:
    effects = (f"{each.total()} {name}" for name, each in books.effects().items())
    return f"{len(books.orders())} orders, {', '.join(effects)}, {books.waiting()} in outboxes"


def _teller(*, silent: bool) -> Say:
    """A function that prints lines with the seconds elapsed, or nothing."""
    started = time.monotonic()

    def say(line: str) -> None:
        if not silent:
            print(f"{time.monotonic() - started:5.1f} s  {line}", flush=True)

    return say


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m example_project.demo",
        description="Run the hot-chocolate shop, kill its processes, count what became of the "
        "orders. The last line is one JSON object; exit code 0 if nothing was lost, duplicated "
        "or phantom.",
    )
    parser.add_argument("--orders", type=int, default=320, help="orders to place (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=14.0, help="time to place them in (%(default)s)"
    )
    parser.add_argument(
        "--broker",
        choices=("embedded", "valkey"),
        default="embedded",
        help="what is between the services: a SQLite file, or a private Valkey or Redis that is "
        "killed too (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="chooses who is killed (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print only the last line")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
