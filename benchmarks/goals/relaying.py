"""S1, S2, S10: from the outbox to the broker, beside the broker's own limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from benchmarks import figures
from benchmarks.contestant import Contestant, ContestantFailed, Measured
from benchmarks.pairing import interleaved
from benchmarks.result import Check, Result
from benchmarks.stage import Cast, Stage

#: Messages of one run; fewer for peers, which are slower.
MESSAGES, OF_PEERS = 4000, 800
ROUNDS = 5
QUEUE = "relayed"
RELAYS = (1, 2, 4)


@dataclass
class Race:
    """Several ways to get messages into one queue, each with its own number of messages."""

    wire: Contestant
    ways: dict[str, tuple[int, Callable[[int], Measured]]] = field(default_factory=dict)

    def run(self, rounds: int) -> dict[str, list[Measured]]:
        """Run all ways, interleaved; count and purge the queue after each."""
        return interleaved({name: partial(self._once, name) for name in self.ways}, rounds=rounds)

    def _once(self, name: str) -> Measured:
        count, send = self.ways[name]
        measured = send(count)
        arrived = self.wire.do("empty").value
        if arrived != count:
            raise ContestantFailed(f"{name}: {arrived} of {count} messages arrived")
        return measured

    def rates(self, measured: dict[str, list[Measured]]) -> dict[str, list[float]]:
        """Messages per second, by way and round."""
        return {
            name: [self.ways[name][0] / each.seconds for each in rounds]
            for name, rounds in measured.items()
        }

    def cpu(self, measured: dict[str, list[Measured]]) -> dict[str, list[float]]:
        """Microseconds of CPU per message, by way and round."""
        return {
            name: [each.cpu / self.ways[name][0] * 1e6 for each in rounds]
            for name, rounds in measured.items()
        }

    def machine(self, measured: dict[str, list[Measured]]) -> dict[str, float]:
        """Median microseconds of CPU per message of all processes together, by way."""
        return {
            f"{name}, and all others": figures.median(
                [each.machine / self.ways[name][0] * 1e6 for each in rounds]
            )
            for name, rounds in measured.items()
        }


def s1(stage: Stage, scale: float) -> Result:
    """The relay to RabbitMQ: classic and quorum queues, beside peers on the classic one."""
    count, fewer = max(1, round(MESSAGES * scale)), max(1, round(OF_PEERS * scale))
    rates: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    machine: dict[str, float] = {}
    not_compared: dict[str, str] = {}
    for kind in ("quorum", "classic"):
        with stage.cast() as cast:
            places = _places(stage, "rabbitmq", kind)
            race = Race(_wire(cast, places))
            race.ways[f"{kind}: limit"] = count, partial(race.wire.do, "write_confirmed")
            race.ways[f"{kind}: ours"] = count, _relaying(cast, "ours", places)
            if kind == "classic":
                plain = cast.contestant("plain", **places)
                race.ways["plain .delay()"] = fewer, partial(plain.do, "fill")
                for module in ("django_celery_outbox", "faststream_outbox"):
                    try:
                        race.ways[module] = fewer, _relaying(cast, module, places, "prepare")
                    except ContestantFailed as error:
                        not_compared[module] = str(error).splitlines()[0]
            measured = race.run(ROUNDS)
        rates.update(race.rates(measured))
        cpu.update(race.cpu(measured))
        machine.update(race.machine(measured))
    limits = {"quorum": 0.90, "classic": 0.80}
    checks = [
        Check.of(
            f"{kind} queue: rate of our relay ÷ of confirmed frames without a database",
            figures.ratios(rates[f"{kind}: ours"], rates[f"{kind}: limit"]),
            at_least=target,
        )
        for kind, target in limits.items()
    ]
    for name, share in (("django_celery_outbox", 40), ("plain .delay()", 15)):
        what = f"CPU per message of our relay ÷ of {name}"
        if name in cpu:
            ratio = figures.ratios(cpu["classic: ours"], cpu[name])
            checks.append(Check.of(what, ratio, at_most=round(1 / share, 4)))
        else:
            checks.append(Check(what, None, 1 / share, at_least=False, why=not_compared[name]))
    return Result(
        "S1",
        checks,
        runs=ROUNDS,
        medians={f"{name}, messages/s": figures.median(each) for name, each in rates.items()},
        cpu={name: figures.median(each) for name, each in cpu.items()} | machine,
        compared=(
            f"{count} messages of about 1 KB, persistent; ours and the limit with a confirm for "
            "each; plain Celery and django-celery-outbox with its defaults without confirms, "
            f"{fewer} messages; faststream-outbox tuned, its start and end included."
        ),
        not_compared=not_compared,
        samples=rates,
        unit="messages/s",
        scale=scale,
    )


def s2(stage: Stage, scale: float) -> Result:
    """The relay to Redis, beside LPUSH of many messages and beside kombu's publishing."""
    count, fewer = max(1, round(MESSAGES * scale)), max(1, round(OF_PEERS * scale))
    with stage.cast() as cast:
        places = _places(stage, "redis", "classic")
        race = Race(_wire(cast, places))
        race.ways["limit: LPUSH of 500"] = count, partial(race.wire.do, "push")
        race.ways["ours"] = count, _relaying(cast, "ours", places)
        race.ways["kombu's publish"] = fewer, partial(race.wire.do, "publish_with_kombu")
        measured = race.run(ROUNDS)
    rates, cpu = race.rates(measured), race.cpu(measured)
    pairs = (("limit: LPUSH of 500", 0.5), ("kombu's publish", 15.0))
    return Result(
        "S2",
        [
            Check.of(
                f"rate of our relay ÷ of {name}",
                figures.ratios(rates["ours"], rates[name]),
                at_least=target,
            )
            for name, target in pairs
        ],
        runs=ROUNDS,
        medians={f"{name}, messages/s": figures.median(each) for name, each in rates.items()},
        cpu={name: figures.median(each) for name, each in cpu.items()} | race.machine(measured),
        compared=(
            f"{count} messages of about 1 KB (kombu's publish: {fewer}), to one list of a Redis "
            "that has every command on disk before it answers (appendfsync always)."
        ),
        samples=rates,
        unit="messages/s",
        scale=scale,
    )


def s10(stage: Stage, scale: float) -> Result:
    """One, two and four relays on one outbox, and the number of duplicates."""
    count = max(10, round(2 * MESSAGES * scale))
    with stage.cast() as cast:
        places = _places(stage, "rabbitmq", "classic")
        wire = _wire(cast, places)
        relays = [_ours(cast, places) for _ in range(max(RELAYS))]
        copies: list[int] = []
        seconds = interleaved(
            {
                _so_many(number): partial(_together, wire, relays[:number], count, copies)
                for number in RELAYS
            },
            rounds=ROUNDS,
        )
    rates = {name: [count / each for each in rounds] for name, rounds in seconds.items()}
    alone = rates[_so_many(1)]
    checks = [
        Check.of(
            f"rate of {_so_many(number)} ÷ of one",
            figures.ratios(rates[_so_many(number)], alone),
            at_least=1.0,
        )
        for number in RELAYS[1:]
    ]
    checks.append(Check.of("copies on the wire", copies, at_most=0))
    return Result(
        "S10",
        checks,
        runs=ROUNDS,
        medians={f"{name}, messages/s": figures.median(each) for name, each in rates.items()},
        compared=f"{count} messages in one outbox, drained by relays in processes of their own.",
        samples=rates,
        unit="messages/s",
        scale=scale,
    )


def _so_many(relays: int) -> str:
    return f"{relays} relay{'s' * (relays > 1)}"


def _together(
    wire: Contestant, relays: Sequence[Contestant], count: int, copies: list[int]
) -> float:
    """Seconds until all messages are sent; records the number of duplicates."""
    relays[0].do("fill", count)
    for each in relays:
        each.begin("drain")
    seconds = max(each.end().seconds for each in relays)
    copies.append(wire.do("empty").value - count)
    return seconds


def _places(stage: Stage, broker: str, kind: str) -> dict[str, str]:
    """The database and broker that the contestants share."""
    return {
        "BENCH_BROKER": stage.broker(broker),
        "BENCH_DATABASE": stage.database(),
        "BENCH_QUEUE": QUEUE,
        "BENCH_QUEUE_TYPE": kind,
    }


def _wire(cast: Cast, places: dict[str, str]) -> Contestant:
    wire = cast.contestant("wire", **places)
    wire.do("declare")
    return wire


def _ours(cast: Cast, places: dict[str, str]) -> Contestant:
    """A relay of celery_eda, in a process that does not send after its own commits."""
    return cast.contestant("ours", **places, BENCH_SETTINGS='{"eda_send_after_commit": false}')


def _relaying(
    cast: Cast, module: str, places: dict[str, str], *first: str
) -> Callable[[int], Measured]:
    """Fill the outbox, untimed, then drain it."""
    relay = _ours(cast, places) if module == "ours" else cast.contestant(module, **places)
    for verb in first:
        relay.do(verb)

    def send(count: int) -> Measured:
        relay.do("fill", count)
        return relay.do("drain")

    return send
