"""Paired differences and their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import SurgicalError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval; `low` and `high` are None where the values do not tell one.

    Attributes:
        mean, low, high: of what was measured.
        confidence: that the interval holds the true mean, were it made many times.
    """

    mean: float
    low: float | None
    high: float | None
    confidence: float

    @property
    def bounds(self) -> list[float] | list[None]:
        """`low` and `high`."""
        return [None, None] if self.low is None or self.high is None else [self.low, self.high]

    @property
    def is_clear(self) -> bool:
        """Whether zero lies outside."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean of `values` and Student's t interval around it; fewer than two values, or all equal, tell none.

    Raises:
        SurgicalError: no values, or a confidence that is not between 0 and 1.

    Example:
        >>> t_interval([1.0, 2.0, 3.0]).high
        4.484...
    """
    if not values or not 0 < confidence < 1:
        raise SurgicalError(f"no interval of {len(values)} values at the confidence {confidence}.")
    mean = statistics.fmean(values)
    if len(values) < 2 or math.isclose(min(values), max(values), rel_tol=1e-9, abs_tol=1e-12):
        return Interval(mean, None, None, confidence)
    half = t_quantile(confidence, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, confidence)


def crossed_interval(values: Sequence[Sequence[float]], confidence: float = CONFIDENCE) -> Interval:
    """The mean of values that were measured with every source model on every draw, and an interval for both.

    Those of one draw share its data, those of one source model its weights: as independent values they would give an
    interval that is too narrow. So the values are averaged over the source models of each draw, and over the draws of
    each source model; either gives a t interval, of as many values as there are draws or source models, and the wider
    one counts. With one source model, or one draw, it is the other's.

    Args:
        values: a sequence for each source model, a value for each draw in it.
        confidence: of the interval.

    Raises:
        SurgicalError: as `t_interval`.

    Example:
        >>> crossed_interval([[0.1, 0.2], [0.2, 0.6]]).low
        -1.313...
    """
    of_draws = t_interval([statistics.fmean(draw) for draw in zip(*values, strict=True)], confidence)
    of_sources = t_interval([statistics.fmean(source) for source in values], confidence)
    return max(
        of_draws, of_sources, key=lambda interval: -1 if interval.high is None else interval.high - interval.mean
    )


def t_quantile(confidence: float, freedom: int) -> float:
    """The number that |t| stays below with probability `confidence`; found by halving.

    Example:
        >>> t_quantile(0.95, 2)
        4.302...
    """
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t) for whole degrees of freedom: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2
    term, total = (cosine if is_odd else 1.0), 0.0
    for power in range(1 if is_odd else 0, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total
