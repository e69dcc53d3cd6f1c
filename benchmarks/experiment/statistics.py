"""Paired statistics over seeds. With few seeds an interval is wide, and that is its message."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean of `count` values, and half the width of its 95 % t-interval; NaN for a single value."""

    mean: float
    half: float
    count: int

    @property
    def contains_zero(self) -> bool:
        """Also where a single value gives no interval."""
        return not abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:+.2f} n/a" if math.isnan(self.half) else f"{self.mean:+.2f} ± {self.half:.2f}"


def t_interval(values: Sequence[float]) -> Interval:
    count = len(values)
    half = float(stats.t.ppf(0.975, count - 1) * stats.sem(values)) if count > 1 else math.nan
    return Interval(float(np.mean(values)), half, count)


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Of values minus others, seed by seed."""
    return t_interval(np.subtract(values, others))


@dataclass(frozen=True)
class Retention:
    """The share of the gain from running all cycles that the single pass keeps, with its 95 % interval."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.share:.0%} [{self.low:.0%}, {self.high:.0%}]"


def retention(plain: Sequence[float], one_pass: Sequence[float], all_cycles: Sequence[float]) -> Retention | None:
    """(one pass - plain) / (all cycles - plain), a ratio of means over the same seeds, with Fieller's interval.

    None where the interval of all cycles - plain contains 0, or there is none: a share of nothing is not a number, and
    Fieller's interval is bounded just where it does not.
    """
    kept, gained = np.subtract(one_pass, plain), np.subtract(all_cycles, plain)
    if t_interval(gained).contains_zero:
        return None
    covariance = np.cov(kept, gained) / len(kept)
    square = stats.t.ppf(0.975, len(kept) - 1) ** 2
    # the shares r for which mean(kept - r * gained) is within t standard errors of 0: a r^2 - 2 b r + c <= 0
    a = gained.mean() ** 2 - square * covariance[1, 1]
    b = kept.mean() * gained.mean() - square * covariance[0, 1]
    c = kept.mean() ** 2 - square * covariance[0, 0]
    width = math.sqrt(max(0.0, b * b - a * c))
    return Retention(float(kept.mean() / gained.mean()), float((b - width) / a), float((b + width) / a))
