"""S3, S4, S8: the cost of publishing to the publisher, inside and outside a transaction."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks import figures
from benchmarks.contestant import Contestant, ContestantFailed, Measured
from benchmarks.pairing import interleaved
from benchmarks.result import Check, Result
from benchmarks.stage import Cast, Stage

ROUNDS = 7
#: Messages in one transaction.
TOGETHER = 1000
#: Transactions of one run.
APART = 200
PRODUCERS = 8
#: Transactions of each of many producers.
OF_EACH, ROUNDS_OF_MANY = 100, 4
#: With this setting no process sends what was committed.
KEPT = '{"eda_send_after_commit": false}'

_numbers = itertools.count(1, 1_000_000)


def s3(stage: Stage, scale: float) -> Result:
    """A thousand messages in one transaction, without waiting for the sending."""
    count = max(1, round(TOGETHER * scale))
    not_compared: dict[str, str] = {}
    with stage.cast() as cast:
        places = _places(stage)
        cases: dict[str, Callable[[], Measured]] = {}
        ours, kept = cast.contestant("ours", **places), _kept(cast, places)
        cases["ours"] = partial(_fill_and_settle, ours, count)
        cases["ours, sent by a relay later"] = partial(kept.do, "fill", count)
        plain = cast.contestant("plain", **places)
        cases["plain .delay()"] = partial(plain.do, "fill", count)
        for module in ("django_celery_outbox", "faststream_outbox", "procrastinate"):
            try:
                peer = cast.contestant(module, **places)
                peer.do("prepare")
                cases[module] = partial(peer.do, "fill", count)
            except ContestantFailed as error:
                not_compared[module] = str(error).splitlines()[0]
        measured = interleaved(cases, rounds=ROUNDS)
    rates = {name: [count / each.seconds for each in rounds] for name, rounds in measured.items()}
    return Result(
        "S3",
        [
            Check.of(
                "rate of ours ÷ of plain, unconfirmed .delay()",
                figures.ratios(rates["ours"], rates["plain .delay()"]),
                at_least=10,
            )
        ],
        runs=ROUNDS,
        medians={f"{name}, messages/s": figures.median(each) for name, each in rates.items()},
        cpu={
            name: figures.median([each.cpu / count * 1e6 for each in rounds])
            for name, rounds in measured.items()
        },
        compared=(
            f"{count} messages of about 1 KB in one transaction, commit included. procrastinate "
            "and faststream-outbox are given all at once by an API of their own."
        ),
        not_compared=not_compared,
        samples=rates,
        unit="messages/s",
        scale=scale,
    )


def s4(stage: Stage, scale: float) -> Result:
    """A row and a message in one transaction, beside the row alone and the row with .delay()."""
    count = max(1, round(APART * scale))
    not_compared: dict[str, str] = {}
    with stage.cast() as cast:
        places = _places(stage)
        ours, kept = cast.contestant("ours", **places), _kept(cast, places)
        plain = cast.contestant("plain", **places)
        cases = {
            "row alone": partial(_numbered, plain, "work", count),
            "row and message of ours": partial(_beside_and_settle, ours, count),
            "the same, sent by a relay later": partial(_numbered, kept, "fill_beside_work", count),
            "row, then plain .delay()": partial(_numbered, plain, "fill_beside_work", count),
        }
        try:
            django = cast.contestant("django_celery_outbox", **places)
            django.do("prepare")
            cases["django: row alone"] = partial(_numbered, django, "work", count)
            cases["django: row and message"] = partial(_numbered, django, "fill_beside_work", count)
        except ContestantFailed as error:
            not_compared["django_celery_outbox"] = str(error).splitlines()[0]
        measured = interleaved(cases, rounds=ROUNDS)
    cost = {
        name: [each.seconds / count * 1e6 for each in rounds] for name, rounds in measured.items()
    }
    alone, message = cost["row alone"], cost["row and message of ours"]
    return Result(
        "S4",
        [
            Check.of(
                "what our message adds ÷ the transaction without it",
                [with_it / without - 1 for with_it, without in zip(message, alone, strict=True)],
                at_most=0.5,
            ),
            Check.of(
                "transaction, then plain .delay() ÷ transaction with our message",
                figures.ratios(cost["row, then plain .delay()"], message),
                at_least=1.5,
            ),
        ],
        runs=ROUNDS,
        medians={f"{name}, µs": figures.median(each) for name, each in cost.items()},
        cpu={
            name: figures.median([each.cpu / count * 1e6 for each in rounds])
            for name, rounds in measured.items()
        },
        compared=(
            f"{count} transactions with one row each, one after the other, on the same engine; "
            "what is sent after the commit goes on beside them."
        ),
        not_compared=not_compared,
        samples=cost,
        unit="µs per transaction",
        scale=scale,
    )


def s8(stage: Stage, scale: float) -> Result:
    """Eight processes that commit a row and a message each, with and without sending."""
    count = max(1, round(OF_EACH * scale))
    with stage.cast() as cast:
        places = _places(stage)
        handing = [cast.contestant("ours", **places) for _ in range(PRODUCERS)]
        keeping = [_kept(cast, places) for _ in range(PRODUCERS)]
        relay = _kept(cast, places)
        seconds = interleaved(
            {
                "handed off to the committing process": partial(_all, handing, count, relay, None),
                "polled by one relay": partial(_all, keeping, count, relay, "relay"),
                "nobody sends": partial(_all, keeping, count, relay, None),
                "NOTIFY in each commit, nobody sends": partial(
                    _all, keeping, count, relay, None, "fill_and_notify"
                ),
            },
            rounds=ROUNDS_OF_MANY,
        )
    many = count * PRODUCERS
    rates = {name: [many / each for each in rounds] for name, rounds in seconds.items()}
    ours = rates["handed off to the committing process"]
    return Result(
        "S8",
        [
            Check.of(
                "commits per second with hand-off ÷ with one polling relay, no wake-ups",
                figures.ratios(ours, rates["polled by one relay"]),
                at_least=0.9,
            )
        ],
        runs=ROUNDS_OF_MANY,
        medians={
            **{f"{name}, commits/s": figures.median(each) for name, each in rates.items()},
            "with hand-off ÷ nobody sends": figures.median(
                figures.ratios(ours, rates["nobody sends"])
            ),
            "NOTIFY ÷ nobody sends": figures.median(
                figures.ratios(rates["NOTIFY in each commit, nobody sends"], rates["nobody sends"])
            ),
        },
        compared=(
            f"{PRODUCERS} processes, {count} transactions each with a row and a message; on the "
            "same cores the messages are sent meanwhile, by the committing processes or by one "
            "relay that polls. Until the last commit; what is unsent by then is sent untimed."
        ),
        samples=rates,
        unit="commits/s",
        scale=scale,
    )


def _places(stage: Stage) -> dict[str, str]:
    return {
        "BENCH_BROKER": stage.broker("rabbitmq"),
        "BENCH_DATABASE": stage.database(),
        "BENCH_QUEUE": "published",
    }


def _kept(cast: Cast, places: dict[str, str]) -> Contestant:
    return cast.contestant("ours", **places, BENCH_SETTINGS=KEPT)


def _numbered(contestant: Contestant, verb: str, count: int) -> Measured:
    """Rows with numbers that are unique among the processes."""
    return contestant.do(verb, count, next(_numbers))


def _fill_and_settle(ours: Contestant, count: int) -> Measured:
    measured = ours.do("fill", count)
    ours.do("settle")
    return measured


def _beside_and_settle(ours: Contestant, count: int) -> Measured:
    measured = _numbered(ours, "fill_beside_work", count)
    ours.do("settle")
    return measured


def _all(
    producers: Sequence[Contestant],
    count: int,
    relay: Contestant,
    sender: str | None,
    verb: str = "fill_beside_work",
) -> float:
    """Seconds until the last of *producers* has committed; empties the outbox afterwards."""
    relay.do("drain")
    if sender:
        relay.begin("relay_until_told")
    for each in producers:
        each.begin(verb, count, next(_numbers))
    seconds = max(each.end().seconds for each in producers)
    if sender:
        relay.tell()
        relay.end()
    relay.do("drain")
    return seconds
