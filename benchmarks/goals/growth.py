"""S7: the costs that grow with the tables, or with a transaction that is left open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import psutil
from sqlalchemy import Engine, create_engine, text

from benchmarks import figures
from benchmarks.contestant import Contestant, Measured
from benchmarks.pairing import interleaved
from benchmarks.result import Check, Result
from benchmarks.stage import Stage

ROUNDS = 5
#: Rows of the big tables at scale 1, and in the goal.
OUTBOX, INBOX = 200_000, 1_000_000
GOAL_OUTBOX, GOAL_INBOX = 1_000_000, 10_000_000
#: Messages claimed and cleared, published, handled in one round.
CLAIMED, PUBLISHED, HANDLED = 5000, 500, 150
#: Rows claimed beside the open transaction, in slices of ``CLAIMED``.
SLICES, PASSES = 6, 3
TARGET = 1.2
#: Messages that the relay sends between two readings of its memory, and readings.
SENT, LOOKS = 4000, 5


def s7(stage: Stage, scale: float) -> Result:
    """Claim, inbox and publishing on empty tables and on big ones, alternating."""
    backlog, remembered = max(1, round(OUTBOX * scale)), max(1, round(INBOX * scale))
    with stage.cast() as cast:
        urls = {name: stage.database() for name in ("empty", "big", "held")}
        broker = stage.broker("rabbitmq")
        places = {
            name: {
                "BENCH_DATABASE": url,
                "BENCH_BROKER": broker,
                "BENCH_QUEUE": "relayed",
                "BENCH_SETTINGS": '{"eda_send_after_commit": false}',
            }
            for name, url in urls.items()
        }
        services = {name: cast.contestant("ours", **place) for name, place in places.items()}
        for service in services.values():
            service.do("fill", 1)
        copy(urls["big"], backlog)
        remember(urls["big"], remembered)
        empty, big = services["empty"], services["big"]
        steps: dict[str, Callable[[Contestant, str], Measured]] = {
            "claim and clear": _claim,
            "publish": lambda service, _: service.do("fill", PUBLISHED),
            "handle": lambda service, _: service.do("handle", HANDLED),
        }
        sizes = {"claim and clear": backlog, "publish": backlog, "handle": remembered}
        goals = {
            "claim and clear": GOAL_OUTBOX,
            "publish": GOAL_OUTBOX,
            "handle": GOAL_INBOX,
        }
        checks, medians = [], {}
        for step, act in steps.items():
            took = interleaved(
                {
                    "empty": partial(act, empty, urls["empty"]),
                    "big": partial(act, big, urls["big"]),
                },
                rounds=ROUNDS,
            )
            if step == "publish":
                empty.do("claim_and_clear", PUBLISHED * (ROUNDS + 1))
            seconds = {name: [each.seconds for each in rounds] for name, rounds in took.items()}
            ratios = figures.ratios(seconds["big"], seconds["empty"])
            fewer = f"measured with {sizes[step]} of {goals[step]} rows: see --scale"
            # A goal that is missed with fewer rows will be missed with more.
            undecided = sizes[step] < goals[step] and figures.median(ratios) <= TARGET
            checks.append(
                Check.of(
                    f"{step}: with {sizes[step]} rows ÷ with none",
                    ratios,
                    at_most=TARGET,
                    why=fewer if undecided else None,
                )
            )
            for name, each in seconds.items():
                medians[f"{step}, {name}, ms"] = 1000 * figures.median(each)
        held = interleaved(
            {
                "open": partial(_slices_beside_open, services["held"], urls["held"]),
                "none": partial(_slices, empty, urls["empty"]),
            },
            rounds=PASSES,
            warm_ups=0,
        )
        last = {name: [slices[-1] for slices in passes] for name, passes in held.items()}
        checks.append(
            Check.of(
                f"claim after {SLICES * CLAIMED} rows: beside a transaction open all the time ÷ "
                "without one",
                figures.ratios(last["open"], last["none"]),
                at_most=TARGET,
            )
        )
        for name, passes in held.items():
            for place, which in ((0, "first"), (-1, "last")):
                middle = figures.median([slices[place] for slices in passes])
                medians[f"claim, transaction beside: {name}, {which} slice, ms"] = 1000 * middle
        memory = _memory(cast.contestant("ours", **places["empty"]), urls["empty"])
        checks.append(
            Check.of(
                f"memory of a relay after {SENT * LOOKS} messages ÷ after {SENT}",
                [memory[-1] / memory[0]],
                at_most=TARGET,
            )
        )
        medians["memory of a relay, MB"] = memory[-1] / 2**20
    return Result(
        "S7",
        checks,
        runs=ROUNDS,
        medians=medians,
        compared=(
            f"Two databases, one with {backlog} messages in the outbox and {remembered} rows in "
            f"the inbox: {CLAIMED} rows claimed and cleared without a broker, {PUBLISHED} "
            f"messages published in one transaction, {HANDLED} handled one by one. What a "
            "transaction left open costs is the dead rows that pile up behind it: it was open for "
            f"{SLICES * CLAIMED} of them, not for an hour."
        ),
        samples={
            f"transaction beside: {name}": [1000 * each for each in passes[-1]]
            for name, passes in held.items()
        },
        unit=f"ms for {CLAIMED} rows, slice by slice",
        scale=scale,
    )


def _claim(service: Contestant, url: str) -> Measured:
    """Claim and clear *CLAIMED* rows, inserted before if there are too few."""
    if service.do("waiting").value < CLAIMED:
        service.do("fill", 1)
        copy(url, CLAIMED - 1)
    return service.do("claim_and_clear", CLAIMED)


def _slices(service: Contestant, url: str) -> list[float]:
    """Seconds for each slice; the rows of all slices are inserted beforehand."""
    service.do("fill", 1)
    copy(url, SLICES * CLAIMED)
    took = [service.do("claim_and_clear", CLAIMED).seconds for _ in range(SLICES)]
    service.do("claim_and_clear", service.do("waiting").value)
    return took


def _slices_beside_open(service: Contestant, url: str) -> list[float]:
    with _transaction_left_open(url):
        return _slices(service, url)


def _memory(relay: Contestant, url: str) -> list[int]:
    """Memory of the process in bytes after each run of its relay."""
    held = []
    for _ in range(LOOKS):
        relay.do("fill", 1)
        copy(url, SENT)
        relay.do("drain")
        held.append(int(psutil.Process(relay.pid).memory_info().rss))
    return held


def copy(url: str, count: int) -> None:
    """Copy the last message of the outbox *count* times."""
    names = (
        "SELECT column_name FROM information_schema.columns WHERE table_name = 'eda_outbox' "
        "AND column_name NOT IN ('id', 'message_id')"
    )
    engine = create_engine(url)
    with engine.begin() as connection:
        columns = ", ".join(connection.scalars(text(names)))
        connection.execute(
            text(
                f"INSERT INTO eda_outbox (message_id, {columns}) "
                f"SELECT gen_random_uuid(), {columns} FROM generate_series(1, :count), "
                "(SELECT * FROM eda_outbox ORDER BY id DESC LIMIT 1) AS template"
            ),
            {"count": count},
        )
    _tidy(engine)


def remember(url: str, count: int, days: int = 0) -> None:
    """Fill the inbox with *count* messages that were handled *days* ago."""
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO eda_inbox (consumer, message_id, revision, outcome, at) "
                "SELECT 'bench.insert', gen_random_uuid(), 0, 'done', "
                "now() - make_interval(days => :days) FROM generate_series(1, :count)"
            ),
            {"count": count, "days": days},
        )
    _tidy(engine)


def _tidy(engine: Engine) -> None:
    """Vacuum, analyze and checkpoint, as if the tables had existed for a while."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in (
            "VACUUM (ANALYZE) eda_outbox",
            "VACUUM (ANALYZE) eda_inbox",
            "CHECKPOINT",
        ):
            connection.execute(text(statement))
    engine.dispose()


@contextmanager
def _transaction_left_open(url: str) -> Iterator[None]:
    """A transaction that has read, and stays open until the end of the block."""
    engine = create_engine(url, isolation_level="REPEATABLE READ")
    with engine.connect() as connection:
        connection.execute(text("SELECT count(*) FROM eda_outbox"))
        yield
    engine.dispose()
