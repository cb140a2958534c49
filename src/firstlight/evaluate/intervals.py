"""Intervals: how far a score may be from what more samples would give. All are for 95 %.

A statistic is a function of sums over clusters (windows of a text, samples of a task), and clusters are what is drawn
again: rows beside each other in one text are not independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]
Statistic = Callable[[Sums], Any]
"""Sums [..., m] -> values [...]."""

_DRAWS = 2000
_Z = 1.959964


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927): right also at 0 and at n of n.

    A sample may count in part: shares scatter less than hits and misses of the same mean, so it is wide enough.
    """
    share, z2 = successes / n, _Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return round(max(centre - half, 0.0), 12), round(min(centre + half, 1.0), 12)


def sign_test(won: int, lost: int) -> float:
    """The exact two-sided sign test of paired samples, McNemar's (1947) where each is right or wrong.

    How likely a split as uneven as this is, if winning and losing were equally likely; ties say nothing.
    """
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1))
    return min(1.0, float(2 * tail / 2**n))


def resampled(clusters: Sums, statistic: Statistic) -> tuple[float, float]:
    """The percentile bootstrap over clusters [n, m] (Efron 1979), the same draws every time."""
    n = len(clusters)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_DRAWS)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.asarray(statistic(counts @ clusters), np.float64)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return math.nan, math.nan
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)
