"""S12: the cost of an event, by the number of subscriptions and of stored events."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial

from sqlalchemy import create_engine, text

from benchmarks import figures
from benchmarks.contestant import Contestant, Measured
from benchmarks.pairing import interleaved
from benchmarks.result import Check, Result
from benchmarks.stage import Cast, Stage

ROUNDS = 5
#: Events of one run: emitted one by one; emitted together and sent; handled.
APART, TOGETHER, HANDLED = 200, 1000, 200
SUBSCRIPTIONS = (1, 4, 16)
#: Events in the big store at scale 1, the scale of the goal, and in one of its streams.
STORED, OF_STREAM = 1_000_000, 100
TARGET = 1.2

_numbers = itertools.count(1, 1_000_000)


def s12(stage: Stage, scale: float) -> Result:
    """Emit, fan out to several queues, handle; then again with a million stored events."""
    stored = max(OF_STREAM, round(STORED * scale))
    with stage.cast() as cast:
        medians = _fan_out(stage, cast)
    with stage.cast() as cast:
        checks, grown = _growth(stage, cast, stored)
    return Result(
        "S12",
        checks,
        runs=ROUNDS,
        medians={**medians, **grown},
        compared=(
            f"Events of about 1 KB on 100 keys, on PostgreSQL and RabbitMQ: {APART} emitted one by "
            f"one and {TOGETHER} in one transaction, then sent by one relay to each number of "
            f"queues, and {HANDLED} of them handled by a worker of two processes, which inserts a "
            f"row for each. Then two stores, one with {stored} events."
        ),
        scale=scale,
    )


def _fan_out(stage: Stage, cast: Cast) -> dict[str, float]:
    """Rates by number of subscriptions."""
    cases: dict[str, Callable[[], Measured]] = {}
    for number in SUBSCRIPTIONS:
        places = _places(stage, SUBSCRIPTIONS=str(number))
        service = cast.contestant("ours", **places)
        service.do("subscribe")
        cases[f"{number}"] = partial(_emitted_and_sent, service)
    sent = interleaved(cases, rounds=ROUNDS)
    medians = {
        "emitted one by one, events/s": APART
        / figures.median([each.value[0] for rounds in sent.values() for each in rounds]),
        "emitted in one transaction, events/s": TOGETHER
        / figures.median([each.value[1] for rounds in sent.values() for each in rounds]),
    }
    for number, rounds in sent.items():
        rate = TOGETHER / figures.median([each.seconds for each in rounds])
        medians[f"sent to {number} queues, events/s"] = rate
    for number in SUBSCRIPTIONS:
        medians[f"handled by {number} subscriptions, deliveries/s"] = _handled(stage, number)
    return medians


def _emitted_and_sent(service: Contestant) -> Measured:
    """Emit both ways, then relay the events that were emitted together."""
    apart = service.do("emit", APART, next(_numbers)).seconds
    service.do("drain")
    together = service.do("emit_together", TOGETHER, next(_numbers)).seconds
    sent = service.do("drain")
    if sent.value != TOGETHER:
        raise RuntimeError(f"{sent.value} of {TOGETHER} events were sent")
    return Measured((apart, together), sent.seconds, sent.cpu, sent.machine)


def _handled(stage: Stage, number: int) -> float:
    """Deliveries per second of a worker with a full queue."""
    with stage.cast() as cast:
        places = _places(stage, SUBSCRIPTIONS=str(number))
        service = cast.contestant("ours", **places)
        service.do("subscribe")
        cast.worker("ours", **places)
        rates = []
        for _ in range(ROUNDS + 1):
            service.do("emit_together", HANDLED, next(_numbers))
            begun, expected, got = time.perf_counter(), HANDLED * number, 0
            service.do("drain")
            while got < expected:
                got += service.do("heard").value
                if time.perf_counter() - begun > 120:
                    raise TimeoutError(f"{got} of {expected} deliveries")
            rates.append(expected / (time.perf_counter() - begun))
    return figures.median(rates[1:])


def _growth(stage: Stage, cast: Cast, stored: int) -> tuple[list[Check], dict[str, float]]:
    """The same steps on an empty store and on a big one, alternating."""
    services = {}
    for name in ("empty", "big"):
        places = _places(stage)
        services[name] = cast.contestant("ours", **places)
        services[name].do("emit_together", OF_STREAM, 1)
        if name == "big":
            fill(places["BENCH_DATABASE"], stored)
        services[name].do("drain")
    checks, medians = [], {}
    for step, act in STEPS.items():
        took = interleaved(
            {name: partial(act, service) for name, service in services.items()}, rounds=ROUNDS
        )
        seconds = {name: [each.seconds for each in rounds] for name, rounds in took.items()}
        what = f"{step}: with {stored} events in the store ÷ with few"
        ratios = figures.ratios(seconds["big"], seconds["empty"])
        why = f"measured with {stored} of {STORED} events: see --scale" if stored < STORED else None
        checks.append(Check.of(what, ratios, at_most=TARGET, why=why))
        for name, each in seconds.items():
            medians[f"{step}, {name}, ms"] = 1000 * figures.median(each)
    return checks, medians


STEPS: dict[str, Callable[[Contestant], Measured]] = {
    f"emit {APART}, one by one": lambda service: service.do("emit", APART, next(_numbers)),
    "give positions, read 1,000": lambda service: service.do("read_page"),
    f"fold a stream of {OF_STREAM}": lambda service: service.do("fold_stream", 0),
}


def fill(url: str, count: int) -> None:
    """Insert *count* events in streams of a hundred, all with positions."""
    names = "type, category, source, data_version, data, time, at, correlation_id, causation_id"
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(
            text(
                f"INSERT INTO eda_events (event_id, position, key, version, {names}) "
                "SELECT gen_random_uuid(), n, 'old' || (n / :many), n % :many + 1, "
                f"{names} FROM generate_series(1, :count) AS n, "
                "(SELECT * FROM eda_events ORDER BY id LIMIT 1) AS template"
            ),
            {"count": count, "many": OF_STREAM},
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM (ANALYZE) eda_events"))
        connection.execute(text("CHECKPOINT"))
    engine.dispose()


def _places(stage: Stage, **environment: str) -> dict[str, str]:
    return {
        "BENCH_DATABASE": stage.database(),
        "BENCH_BROKER": stage.broker("rabbitmq"),
        "BENCH_QUEUE": "events",
        "BENCH_SETTINGS": '{"eda_send_after_commit": false}',
        **{f"BENCH_{name}": value for name, value in environment.items()},
    }
