"""Books trips with each kind of request: ``python -m example_project.booking``.

The last line is one JSON object. The exit code is 0 only if every reply reached its requester,
every seat was sold once, and no reply queue is left.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import redis

from example_project.demo.processes import Failed
from example_project.town import PATIENCE, Town

SERVICES = ("orders", "airline", "agency")
PACKAGE = "example_project.booking"
FLIGHT = "LH454"


def main() -> int:
    """Run the story in a temporary folder, which is kept if it fails."""
    folder = Path(tempfile.mkdtemp(prefix="celery-eda-booking-"))
    try:
        with ExitStack() as ends:
            figures = tell(_opened(folder, ends))
    except Failed as failed:
        print(failed, file=sys.stderr)
        print(f"The databases and the logs are kept in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(json.dumps(figures))
    return 0 if figures == EXPECTED else 1


#: The expected figures. Two requests are concurrent, so either may get seat 1.
EXPECTED = {
    "order_id": 124,
    "passengers": ["Ada", "Bob"],
    "numbers": [f"{FLIGHT}-0001", f"{FLIGHT}-0002"],
    "after_a_crash": f"{FLIGHT}-0003",
    "sold_out": True,
    "reply_queues_left": 0,
}


def tell(town: Town) -> dict[str, object]:
    """Ask in every way, and print the replies."""
    from example_project.booking import agency

    reply = agency.order("Ada")
    order_id = reply.get()
    print(f"request {reply.correlation_id}: order entry answers with the order's id, {order_id}")

    by_id = agency.book("Ada", FLIGHT, "correlation")
    by_queue = agency.book("Bob", FLIGHT, "temporary")
    confirmations = [by_id.get(), by_queue.get()]
    for way, each in zip(("correlation id", "a queue of its own"), confirmations, strict=True):
        print(f"by {way}: {each['number']} for {each['passenger']}")

    asking = f"{PACKAGE}.agency"
    code = f"import os; from {asking} import book; book('Eve', {FLIGHT!r}, 'durable'); os._exit(9)"
    town.run("crash", "-c", code).wait(PATIENCE)
    recovered = agency.confirmation_of("Eve")
    print(f"asked by a process that died, answered to another one: {recovered}")

    try:
        agency.book("Mallory", FLIGHT, "correlation").get()
        sold_out = False
    except agency.SoldOut as error:
        sold_out = True
        print(f"the airline's own error comes back: {type(error).__name__}({error})")

    agency.eda.requests.mailbox.close()
    return {
        "order_id": order_id,
        "passengers": [each["passenger"] for each in confirmations],
        "numbers": sorted(each["number"] for each in confirmations),
        "after_a_crash": recovered,
        "sold_out": sold_out,
        "reply_queues_left": reply_queues(town),
    }


def _opened(folder: Path, ends: ExitStack) -> Town:
    town = Town(folder, ends, PACKAGE)
    for name in SERVICES:
        # The agency has no tasks; its worker only receives the replies to its durable requests.
        town.open([name], "-Q", "eda.replies.agency" if name == "agency" else f"town.{name}")
    return town


def reply_queues(town: Town) -> int:
    """The number of reply queues on the broker."""
    with redis.Redis.from_url(town.broker) as client:
        return len(client.keys("eda.reply.*"))


if __name__ == "__main__":
    sys.exit(main())
