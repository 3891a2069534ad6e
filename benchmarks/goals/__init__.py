"""One module per family of goals; ``GOALS`` finds the module of a goal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.result import Result
    from benchmarks.stage import Stage


@dataclass(frozen=True)
class Goal:
    """A goal, and the function that measures it."""

    says: str
    where: str

    def measure(self, stage: Stage, scale: float) -> Result:
        """Measure the goal; *scale* multiplies the number of messages or rows."""
        module, _, name = self.where.partition(":")
        function: Callable[[Stage, float], Result]
        function = getattr(import_module(f"benchmarks.goals.{module}"), name)
        return function(stage, scale)


GOALS = {
    "S1": Goal("relay to RabbitMQ, confirmed, beside the limit of the broker", "relaying:s1"),
    "S2": Goal("relay to Redis, beside the limit of the server", "relaying:s2"),
    "S3": Goal("1,000 messages in one transaction beside 1,000 plain ones", "enqueueing:s3"),
    "S4": Goal("what one message adds to a transaction", "enqueueing:s4"),
    "S5": Goal("from the commit to the start of the task", "latency:s5"),
    "S6": Goal("what the inbox adds to a handler", "handling:s6"),
    "S7": Goal("what grows with the tables", "growth:s7"),
    "S8": Goal("eight producers that commit", "enqueueing:s8"),
    "S9": Goal("request and reply beside Celery's own results", "requests:s9"),
    "S10": Goal("several relays beside one", "relaying:s10"),
    "S11": Goal("the extension loaded and not used", "idle:s11"),
    "S12": Goal("events: emitted, fanned out, and kept", "events:s12"),
    "S13": Goal("a flow of five steps: chain, events, saga", "flows:s13"),
    "S14": Goal("the database as broker, beside brokers and queues", "no_broker:s14"),
    "S15": Goal("many keys, the housekeeping, and a worker's memory", "keeping:s15"),
    "S16": Goal("parked messages whose turn has come", "draining:s16"),
}
