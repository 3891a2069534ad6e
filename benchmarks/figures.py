"""What many runs say: medians, how far they spread, and ratios of runs that belong together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def median(values: Sequence[float]) -> float:
    """The middle one of *values*."""
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of *values* that at least *share* (0 to 1) of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """The ratio of each pair: what one round measured of both."""
    return [a / b for a, b in zip(over, under, strict=True)]


def spread(values: Sequence[float]) -> list[float]:
    """The least and the greatest of *values*."""
    return [rounded(min(values)), rounded(max(values))]


def rounded(value: float) -> float:
    """*value* with four significant digits."""
    return float(f"{value:.4g}")
