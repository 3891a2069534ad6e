"""Statistics of many runs: medians, spreads, and ratios within one round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def median(values: Sequence[float]) -> float:
    """The median of *values*."""
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of *values*; *share* is between 0 and 1."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """The ratio of each pair, measured in the same round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def spread(values: Sequence[float]) -> list[float]:
    """The least and the greatest of *values*."""
    return [rounded(min(values)), rounded(max(values))]


def rounded(value: float) -> float:
    """*value* with four significant digits."""
    return float(f"{value:.4g}")
