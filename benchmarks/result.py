"""What one goal's script found, as the one line of JSON that it prints."""

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
#: How busy the machine may be just before a goal, in percent; above that the run is disturbed.
QUIET = 25.0
#: Seconds for which it is looked at. Its load average still knows of the goal before.
LOOK = 1.0


@dataclass(frozen=True)
class Check:
    """One condition of a goal.

    Attributes:
        what: is divided by what.
        ratio: the median of the ratios of all rounds; None if it could not be measured.
        target: what it is held against.
        at_least: whether more is better.
        spread: the least and the greatest ratio of a round.
        why: there is no ratio, or no verdict.
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
        """The condition that the median of *ratios* is *at_least*, or *at_most*, so much.

        *why*, if given, says why the ratio is no verdict yet.
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
    """All of one goal.

    Attributes:
        goal: its number, S1 to S15.
        checks: its conditions; the first one gives the line its ratio and target.
        runs: rounds that counted.
        medians: by case and unit, what the ratios were made of.
        cpu: microseconds of CPU per message, by case.
        compared: what was done, in one sentence.
        not_compared: peers that the goal names and that did not run, and why.
        samples: by case, one figure of each round, for the plots; the unit stands in ``unit``.
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
        """True if all conditions hold, False if one does not, else None."""
        verdicts = [check.met for check in self.checks]
        if False in verdicts:
            return False
        return None if None in verdicts else True

    def line(self, machine: dict[str, Any]) -> dict[str, Any]:
        """What is printed."""
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
    """What was measured on; to be asked before the run."""
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
