"""A bank whose transfers have every part that a saga may have, and go wrong at random.

``python -m tests.faults.programs.random_bank FIRST LAST`` begins the transfers of these numbers;
what goes wrong with one follows from its number. Where ``ROAD_KILLS`` says so, the process that
moves a saga on is killed: before each kind of transition, in the middle of it, and right after its
commit, once for each. A tenth of the replies come twice, by another message, and a tenth come late.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from contextlib import suppress
from typing import Any

from celery.exceptions import Ignore
from sqlalchemy import insert, update
from sqlalchemy.orm import Session

from celery_eda import Event, RetryPolicy
from celery_eda.core import checkpoints
from celery_eda.core.addresses import REPLY_TASK
from celery_eda.errors import SagaError
from celery_eda.requests.responder import Responder
from celery_eda.sagas.definition import Data
from celery_eda.sagas.engine import SagaEngine
from celery_eda.sagas.steps import Steps
from celery_eda.sagas.transition import Transition
from tests.faults.programs.order_system import _first_time, app, eda
from tests.faults.programs.tables import accounts, effects

__all__ = ["app", "eda"]

#: Account 0 has what was taken and not given yet, so that the sum never changes.
TRANSIT, ACCOUNTS, OPENING = 0, 8, 1000
POLICY = RetryPolicy(attempts=3, first=0.1, longest=0.2)
FOR_GOOD = 1000


def plan_of(number: int) -> dict[str, Any]:
    """What is to happen to the transfer *number*."""
    chance = random.Random(number)
    source, target = chance.sample(range(1, ACCOUNTS + 1), 2)
    return {
        "number": number,
        "source": source,
        "target": target,
        "take_fails": chance.choice([0, 0, 0, 0, 0, 1, 2, 3]),
        "give_fails": chance.choice([0, 0, 0, 0, 1, 2, FOR_GOOD]),
        "undo_fails": chance.choice([0, 0, 0, 1, 2, FOR_GOOD]),
        "hurried": chance.random() < 0.1,
        "seconds": chance.uniform(0.0, 0.6),
        "asks": chance.random() < 0.2,
        "books": chance.random() < 0.2,
        "reports": chance.random() < 0.2,
        "locks": chance.random() < 0.1,
        "ends_badly": chance.random() < 0.1,
    }


# ── what the steps do ───────────────────────────────────────────────────────────────────────


def fail(name: str, number: int, times: int) -> None:
    """Refuse so often; for good until somebody has healed it."""
    if times == FOR_GOOD:
        if not os.path.exists(os.path.join(os.environ["ROAD_FOLDER"], "healed")):
            raise Ignore(f"{name} {number} is refused")
    elif any(_first_time(f"{name}{number}.{time}") for time in range(times)):
        raise Ignore(f"{name} {number} is refused this time")


def move(session: Session, name: str, number: int, source: int, target: int) -> None:
    for account, amount in sorted([(source, -1), (target, 1)]):
        here = update(accounts).where(accounts.c.id == account)
        session.execute(here.values(visits=accounts.c.visits + amount))
    session.execute(insert(effects).values(name=name, number=number))


@eda.task(name="bank.take")
def take(session: Session, data: Data) -> None:
    fail("take", data["number"], data["take_fails"])
    move(session, "take", data["number"], data["source"], TRANSIT)


@eda.task(name="bank.give_back")
def give_back(session: Session, data: Data) -> None:
    fail("give back", data["number"], data["undo_fails"])
    move(session, "give back", data["number"], TRANSIT, data["source"])


@eda.task(name="bank.give")
def give(session: Session, data: Data) -> None:
    if data["give_fails"] == FOR_GOOD:
        raise Ignore("the account is closed")
    fail("give", data["number"], data["give_fails"])
    move(session, "give", data["number"], TRANSIT, data["target"])


@eda.task(name="bank.take_back")
def take_back(session: Session, data: Data) -> None:
    move(session, "take back", data["number"], data["target"], TRANSIT)


def noted(name: str) -> Any:
    """A task that does nothing but say that it was there."""

    @eda.task(name=f"bank.{name.replace(' ', '_')}")
    def note(session: Session, data: Data) -> None:
        session.execute(insert(effects).values(name=name, number=data["number"]))

    return note


@eda.task(name="bank.hurry")
def hurry(session: Session, data: Data) -> None:
    session.execute(insert(effects).values(name="hurry", number=data["number"]))
    time.sleep(data["seconds"])


@eda.task(name="bank.ask")
def ask(session: Session, data: Data) -> None:
    told = {each: data[each] for each in ("number", "seconds")}
    eda.emit("approval.given", told, key=data["number"])


@eda.task(name="bank.end")
def end(session: Session, data: Data) -> None:
    if data["ends_badly"]:
        raise Ignore("after all, no")
    session.execute(insert(effects).values(name="end", number=data["number"]))


@eda.on("approval.given", name="bank.approve")
def approve(session: Session, event: Event) -> None:
    """An event from outside is a signal; it may come too early, or when its time is over."""
    time.sleep(event.data["seconds"])
    with suppress(SagaError):
        transfer.signal(f"transfer {event.data['number']}", "approved", True, who="an event")


# ── the sagas ───────────────────────────────────────────────────────────────────────────────


@eda.saga("report")
def report(steps: Steps) -> None:
    steps.step("write", noted("write"), undo=noted("tear up"))
    steps.step("file", noted("file"), undo=noted("take out"))


def is_(what: str) -> Any:
    return lambda data: data[what]


@eda.saga("transfer")
def transfer(steps: Steps) -> None:
    with steps.when(is_("locks")):
        steps.lock("account", lambda data: f"account {data['source']}")
    steps.step("take", take, undo=give_back, retry=POLICY)
    with steps.parallel():
        with steps.branch():
            steps.step("give", give, undo=take_back, retry=POLICY)
        with steps.branch():
            with steps.when(is_("hurried")):
                steps.step("hurry", hurry, undo=noted("slow down"), timeout=0.6)
            with steps.when(is_("asks")):
                steps.step("ask", ask)
                steps.wait_for("approved", timeout=0.4, default=False)
    with steps.when(is_("books")), steps.parallel("first", need=1):
        for who in ("north", "south"):
            with steps.branch():
                steps.step(who, noted(f"book {who}"), undo=noted(f"leave {who}"))
    with steps.when(is_("reports")):
        steps.saga("report", report)
    with steps.repeat(lambda data: data.get("round") != "last", limit=3):
        steps.step("count", noted("count"), keep=None)
        steps.wait_for("round", timeout=0.1, default="last")
    steps.step("end", end)
    steps.pivot()


# ── what goes wrong with those that move them on ────────────────────────────────────────────


def _kill_at_transitions() -> None:
    write_end, advance, ended = Transition.end, SagaEngine.advance, list[str]()

    def die_once(when: str) -> None:
        if any(_first_time(f"killed {when} {what}") for what in ended):
            os.kill(os.getpid(), signal.SIGKILL)

    def end_and_die(self: Any, record: Any, status: Any, **how: Any) -> None:
        ended.append(f"{record.kind.value}.{record.path}.{status.value}")
        die_once("before")
        write_end(self, record, status, **how)

    def advance_and_die(self: Any, transition: Any) -> None:
        advance(self, transition)
        die_once("in")

    Transition.end, SagaEngine.advance = end_and_die, advance_and_die  # type: ignore[method-assign]
    checkpoints.arm("delivery.received", ended.clear)
    checkpoints.arm("delivery.committed", lambda: die_once("after"))


def _disturb_replies() -> None:
    """Some come twice, as another message and later; some come later in the first place."""
    chance, publish = random.Random(), Responder._publish

    def publish_somehow(
        self: Any, address: str, identity: Any, request: str, root: Any, outcome: Any
    ) -> None:
        late = chance.random() < 0.1
        if not late:
            publish(self, address, identity, request, root, outcome)
        if late or chance.random() < 0.1:
            app.send_task(
                *(REPLY_TASK, (request, outcome)),
                queue=address,
                countdown=chance.uniform(0.05, 1.0),
                ignore_result=True,
            )

    Responder._publish = publish_somehow  # type: ignore[method-assign]


if os.environ.get("ROAD_KILLS") == "1":
    _kill_at_transitions()
    _disturb_replies()


if __name__ == "__main__":
    first, last = map(int, sys.argv[1:])
    for number in range(first, last + 1):
        transfer.start(plan_of(number), id=f"transfer {number}")
