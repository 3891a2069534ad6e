"""Canvas under fault: the same tasks as a plain Celery app and as a reliable one.

``ROAD_PLAIN=1`` makes it the plain app. ``ROAD_CHAOS`` (seed, likelihood, number of kills) lets
processes kill themselves at random steps, also between the steps that Celery takes on its own to
complete a chord. ``python -m tests.faults.programs.canvas_system NAME…`` publishes in one
transaction, waits for the results and prints them as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from celery import Celery, chain, chord, group
from celery.backends.base import Backend
from celery.backends.redis import RedisBackend
from sqlalchemy import create_engine, insert

from celery_eda.core import checkpoints
from tests.faults.programs.tables import effects

PLAIN = os.environ.get("ROAD_PLAIN") == "1"
PATIENCE = 150
if PLAIN:
    app = Celery("road", broker=os.environ["ROAD_BROKER"], backend=os.environ["ROAD_RESULTS"])
    app.conf.task_default_queue = "plain"
    task = app.task
    transaction: Callable[[], Any] = nullcontext
    engine = create_engine(os.environ["ROAD_DATABASE"])
else:
    from tests.faults.programs.order_system import app, eda

    task = eda.task
    transaction = eda.transaction
app.conf.task_allow_error_cb_on_chord_header = True


def record(name: str, number: int) -> None:
    """Take effect: in the message's transaction, or, in the plain app, at once."""
    row = insert(effects).values(name=name, number=number)
    if not PLAIN:
        eda.session.execute(row)
        return
    with engine.begin() as connection:
        connection.execute(row)


@task(name="canvas.add")
def add(left: int, right: int) -> int:
    record("add", left * 1000 + right)
    return left + right


@task(name="canvas.total")
def total(numbers: list[int], more: int = 0) -> int:
    record("total", sum(numbers) + more)
    return sum(numbers) + more


@task(name="canvas.keep")
def keep(value: Any, number: int) -> Any:
    record("keep", number)
    return value


@task(name="canvas.again", bind=True, max_retries=3)
def again(self: Any, number: int) -> int:
    if self.request.retries < 2:
        raise self.retry(countdown=0.1)
    record("again", number)
    return number


@task(name="canvas.swap", bind=True)
def swap(self: Any, number: int, how: str) -> None:
    record("swap", number)
    raise self.replace(
        {
            "task": add.s(number, 1),
            "chain": add.s(number, 1) | add.s(2),
            "chord": chord([add.s(number, 1), add.s(number, 2)], total.s()),
        }[how]
    )


@task(name="canvas.fail")
def fail(number: int) -> None:
    raise ValueError(f"no {number}")


@task(name="canvas.mourn")
def mourn(task_id: str) -> None:
    """An errback of the old style: a message of its own."""
    record("mourn", 1)


@task(name="canvas.mourn_here")
def mourn_here(request: Any, error: Exception, traceback: Any) -> None:
    """An errback of the new style: a call where the failure is recorded."""
    record("mourn here", 1)
    add.delay(7, 7)


def stamped(canvas: Any) -> Any:
    canvas.stamp(None, shop="north")
    return canvas


CANVAS: dict[str, Callable[[], Any]] = {
    "chain": lambda: chain(add.s(1, 1), again.s(), add.s(2), keep.s(1)),
    "links": lambda: add.s(2, 2).set(link=[add.s(20), keep.s(2)]),
    "group": lambda: group(add.s(3, n) for n in range(4)),
    "chord": lambda: chord([add.s(4, n) for n in range(4)], total.s()),
    "chord with retry": lambda: chord([add.s(5, 5), again.s(5)], total.s(more=500)),
    "chord of groups": lambda: chord([group(add.s(6, 1), add.s(6, 2)), add.s(6, 3)], keep.s(6)),
    "chain of chords": lambda: chain(
        group(add.s(7, 1), add.s(7, 2)), total.s(700), group(add.s(71), add.s(72)), total.s(710)
    ),
    "chord with a chain": lambda: chord(
        [add.s(8, 1) | add.s(80), add.s(8, 2)], total.s() | keep.s(8)
    ),
    "chord with a group": lambda: chord(
        [add.s(9, 1), add.s(9, 2)], group(total.s(90), total.s(91))
    ),
    "replaced": lambda: swap.s(10, "task"),
    "replaced by a chain": lambda: swap.s(11, "chain") | keep.s(11),
    "replaced by a chord": lambda: swap.s(12, "chord") | keep.s(12),
    "errbacks": lambda: fail.s(13).set(link_error=[mourn.s(), mourn_here.s()]),
    "failing chain": lambda: chain(add.s(14, 1), fail.s(), add.s(1)).on_error(mourn.s()),
    "failing chord": lambda: chord([add.s(15, 1), fail.si(15)], total.s().on_error(mourn.s())),
    "chord of failures": lambda: chord([fail.si(20), fail.si(20)], total.s().on_error(mourn.s())),
    "starmap": lambda: add.starmap([(16, 1), (16, 2)]),
    "chunks": lambda: add.chunks([(17, n) for n in range(4)], 2).group(),
    "stamps": lambda: stamped(chain(add.s(18, 1), group(add.s(18), add.s(19)), total.s(180))),
}

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def outcome(result: Any) -> Any:
    """What *result* comes to; of an error its type and text, without ids."""
    value = result.get(timeout=PATIENCE, propagate=False)
    return json.loads(_ID.sub("…", json.dumps(value, default=repr)))


def publish(names: list[str]) -> None:
    with transaction():
        canvas = {name: CANVAS[name]().apply_async() for name in names}
    json.dump({name: outcome(result) for name, result in canvas.items()}, sys.stdout)


# ── chaos ───────────────────────────────────────────────────────────────────────────────────


class Chaos:
    """Kills the process it is in, now and then, until *limit* processes were killed.

    With the name of a *step*, only there.
    """

    def __init__(self, seed: str, likelihood: str, limit: str, step: str = "") -> None:
        self.dice = random.Random()
        self.seed = seed
        self.likelihood = float(likelihood)
        self.limit = int(limit)
        self.step = step
        self.pid = 0

    def strike(self, step: str) -> None:
        if self.pid != os.getpid():
            self.pid = os.getpid()
            self.dice.seed(f"{self.seed} {self.pid}")
        if self.step not in ("", step):
            return
        if self.dice.random() < self.likelihood and self._permitted(step):
            os.kill(os.getpid(), signal.SIGKILL)

    def _permitted(self, step: str) -> bool:
        folder = os.environ["ROAD_FOLDER"]
        for number in range(self.limit):
            path = os.path.join(folder, f"kill{number}")
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                continue
            os.write(handle, step.encode())
            os.close(handle)
            return True
        return False

    def around(self, owner: Any, name: str) -> None:
        """Strike also before and after a call of Celery's own."""
        call = getattr(owner, name)

        @functools.wraps(call)
        def called(*args: Any, **kwargs: Any) -> Any:
            self.strike(f"before {name}")
            returned = call(*args, **kwargs)
            self.strike(f"after {name}")
            return returned

        setattr(owner, name, called)


if settings := os.environ.get("ROAD_CHAOS"):
    chaos = Chaos(*settings.split(","))
    for each in checkpoints.STEPS:
        checkpoints.arm(each, functools.partial(chaos.strike, each))
    chaos.around(RedisBackend, "on_chord_part_return")
    chaos.around(RedisBackend, "_chord_publish_claim_expires")
    chaos.around(type(app.amqp), "_retry_publish")
    chaos.around(Backend, "store_result")
    chaos.around(Backend, "chord_error_from_stack")
    chaos.around(Backend, "fail_from_current_stack")

if __name__ == "__main__":
    publish(sys.argv[1:])
