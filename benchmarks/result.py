"""The result of one goal, printed as one line of JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from benchmarks import figures

PACKAGES = (
    "celery",
    "kombu",
    "amqp",
    "redis",
    "sqlalchemy",
    "psycopg",
    "celery-eda",
    "django-celery-outbox",
    "faststream-outbox",
    "procrastinate",
)
#: CPU load just before a goal, in percent, above which a run counts as disturbed.
QUIET = 25.0
#: Seconds over which the load is measured; the load average would include the goal before.
LOOK = 1.0


@dataclass(frozen=True)
class Check:
    """One condition of a goal.

    Attributes:
        what: names the numerator and the denominator of the ratio.
        ratio: the median of the ratios of all rounds; None if it could not be measured.
        target: the bound for the ratio.
        at_least: True if the bound is a lower one.
        spread: the least and the greatest ratio of a round.
        why: the reason for a missing ratio or verdict.
    """

    what: str
    ratio: float | None
    target: float
    at_least: bool
    spread: list[float] | None = None
    why: str | None = None

    @classmethod
    def of(
        cls,
        what: str,
        ratios: Sequence[float],
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        why: str | None = None,
    ) -> Check:
        """The condition that the median of *ratios* is *at_least* or *at_most* a bound.

        *why*, if given, is the reason that the ratio gives no verdict yet.
        """
        target = at_most if at_least is None else at_least
        assert target is not None, "a goal has a target"
        ratio = figures.rounded(figures.median(ratios))
        return cls(what, ratio, target, at_least is not None, figures.spread(ratios), why)

    @property
    def met(self) -> bool | None:
        if self.ratio is None or self.why:
            return None
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target


@dataclass(frozen=True)
class Result:
    """The result of one goal.

    Attributes:
        goal: its number, S1 to S16.
        checks: its conditions; the first one gives the line its ratio and target.
        runs: number of rounds, without warm-ups.
        medians: the figures behind the ratios, by case and unit.
        cpu: microseconds of CPU per message, by case.
        compared: the comparison in one sentence.
        not_compared: peers of the goal that did not run, with the reason.
        samples: by case, one figure per round, in ``unit``, for the plots.
    """

    goal: str
    checks: Sequence[Check]
    runs: int
    medians: dict[str, float]
    compared: str
    cpu: dict[str, float] = field(default_factory=dict)
    not_compared: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    unit: str = ""
    scale: float = 1.0

    @property
    def met(self) -> bool | None:
        """True if all conditions hold, False if one fails, None if one has no verdict."""
        verdicts = [check.met for check in self.checks]
        if False in verdicts:
            return False
        return None if None in verdicts else True

    def line(self, machine: dict[str, Any]) -> dict[str, Any]:
        """The values of the JSON line."""
        first = self.checks[0]
        why = "; ".join(f"{check.what}: {check.why}" for check in self.checks if check.why)
        return {
            "goal": self.goal,
            "ratio": first.ratio,
            "target": f"{'≥' if first.at_least else '≤'} {first.target:g}",
            "met": self.met,
            **({"why": why} if why else {}),
            "runs": self.runs,
            "spread": first.spread,
            "checks": [{**asdict(check), "met": check.met} for check in self.checks],
            "medians": {name: figures.rounded(value) for name, value in self.medians.items()},
            "cpu_us_per_message": {
                name: figures.rounded(value) for name, value in self.cpu.items()
            },
            "compared": self.compared,
            "not_compared": self.not_compared,
            "samples": {
                name: [figures.rounded(v) for v in vs] for name, vs in self.samples.items()
            },
            "unit": self.unit,
            "scale": self.scale,
            **machine,
        }


def machine() -> dict[str, Any]:
    """The machine and its load; to be called before the run."""
    busy = psutil.cpu_percent(LOOK)
    return {
        "disturbed": busy > QUIET,
        "busy_before": busy,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def printed(line: dict[str, Any]) -> str:
    """*line* as one line of JSON."""
    return json.dumps(line, ensure_ascii=False)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
