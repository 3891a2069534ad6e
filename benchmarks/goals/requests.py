"""S9: a request and its reply, both committed, beside those of Celery, which are not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks import figures
from benchmarks.contestant import Contestant, ContestantFailed, Measured
from benchmarks.pairing import interleaved
from benchmarks.result import Check, Result
from benchmarks.stage import Cast, Stage, Worker

ADDRESSES = ("correlation", "temporary", "durable")
ROUNDS = 5
#: Requests of one round: sequential, and concurrent.
IN_TURN, AT_ONCE = 60, 100
#: Seconds after which a round of one case ends.
LONGEST = 1.0
#: The goal: at most this many times the median of Celery's rpc backend.
TARGET = 1.5

#: A case: the client, the responder, the sequential verb, and the concurrent one, if any.
Case = tuple[Contestant, Worker, tuple[object, ...], tuple[object, ...] | None]


def s9(stage: Stage, scale: float) -> Result:
    """From ``request()`` to the reply on RabbitMQ and Redis, sequentially and concurrently."""
    in_turn, at_once = max(1, round(IN_TURN * scale)), max(1, round(AT_ONCE * scale))
    checks: list[Check] = []
    medians: dict[str, float] = {}
    cpu: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    not_compared: dict[str, str] = {}
    for broker, rival in (("rabbitmq", "rpc"), ("redis", "redis")):
        with stage.cast() as cast:
            cases = _cases(stage, cast, broker, not_compared)
            replies = interleaved(
                {name: partial(_ask, case, in_turn) for name, case in cases.items()}, rounds=ROUNDS
            )
            floods = interleaved(
                {name: partial(_flood, case, at_once) for name, case in cases.items() if case[3]},
                rounds=ROUNDS,
            )
        medians.update(_latencies(replies))
        for name, rounds in floods.items():
            medians[f"{name}, replies/s"] = figures.median([at_once / each for each, _ in rounds])
            cpu[name] = figures.median([used / at_once * 1e6 for _, used in rounds])
        p50 = {name: [figures.median(each) for each in rounds] for name, rounds in replies.items()}
        samples.update({name: [1000 * each for each in rounds] for name, rounds in p50.items()})
        for address in ADDRESSES[:2]:
            what = f"{broker}: p50 of ours by {address} ÷ of Celery's {rival} backend"
            names = (f"{broker}, ours by {address}", f"{broker}, Celery's {rival}")
            if missing := [name for name in names if name not in p50]:
                why = "; ".join(f"{name} did not run: {not_compared[name]}" for name in missing)
                checks.append(Check(what, None, TARGET, at_least=False, why=why))
            else:
                over, under = (p50[name] for name in names)
                checks.append(Check.of(what, figures.ratios(over, under), at_most=TARGET))
    return Result(
        "S9",
        checks,
        runs=ROUNDS,
        medians=medians,
        cpu=cpu,
        compared=(
            "The same function of one number, asked by one process of one worker (prefork, 2 "
            "slots): ours commits request, inbox row and reply; Celery's backends commit nothing "
            "and acknowledge early. CPU is that of requester and worker together."
        ),
        not_compared=not_compared,
        samples=samples,
        unit="ms, p50 of a round",
        scale=scale,
    )


def _cases(stage: Stage, cast: Cast, broker: str, not_compared: dict[str, str]) -> dict[str, Case]:
    url = stage.broker(broker)
    ours = {"BENCH_BROKER": url, "BENCH_DATABASE": stage.database()}
    asks, asked = cast.contestant("ours", **ours), cast.worker("ours", **ours)
    cases: dict[str, Case] = {
        f"{broker}, ours by {address}": (asks, asked, ("ask", address), ("flood", address))
        for address in ADDRESSES
    }
    for backend, address in (("rpc", "rpc://"), ("redis", stage.broker("redis"))):
        plain = {"BENCH_BROKER": url, "BENCH_BACKEND": address, "BENCH_QUEUE": f"plain-{backend}"}
        asks, asked = cast.contestant("plain", **plain), cast.worker("plain", **plain)
        cases[f"{broker}, Celery's {backend}"] = (asks, asked, ("ask",), ("flood",))
        if backend == "rpc" and broker == "rabbitmq":
            temporary = ("ask_over_temporary_queues",)
            cases[f"{broker}, plain temporary queues"] = (asks, asked, temporary, None)
    for name, case in list(cases.items()):
        try:
            _ask(case, 5)
        except ContestantFailed as error:
            not_compared[name] = str(error).splitlines()[0]
            del cases[name]
    return cases


def _ask(case: Case, count: int) -> list[float]:
    """Seconds of each round trip."""
    asks, _, (verb, *rest), _ = case
    measured = asks.do(str(verb), count, LONGEST, *rest)
    taken: list[float] = measured.value
    return taken


def _flood(case: Case, count: int) -> tuple[float, float]:
    """Seconds of all concurrent requests, and seconds of CPU of both sides."""
    asks, asked, _, words = case
    assert words, "it cannot ask all at once"
    verb, *rest = words
    before = asked.cpu()
    measured: Measured = asks.do(str(verb), count, *rest)
    return measured.seconds, measured.cpu + asked.cpu() - before


def _latencies(replies: dict[str, list[list[float]]]) -> dict[str, float]:
    given: dict[str, float] = {}
    summary: Callable[[list[float], float], float] = figures.percentile
    for name, rounds in replies.items():
        everything = [each for one in rounds for each in one]
        for share in (0.5, 0.99):
            given[f"{name}, p{share * 100:.0f} ms"] = 1000 * summary(everything, share)
    return given
