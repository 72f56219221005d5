"""Choice of a learning rate: the best of a grid by mean validation, and the next rate to try at its edge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

MOST = 2  # rates that are added to a side


def best_rate(means: Mapping[float, float]) -> float:
    """The rate with the largest mean; of equals the lowest, and what is no finite number is below all.

    Args:
        means: of the validation metric over all trainings at each rate.

    Example:
        >>> best_rate({1e-3: 0.7, 3e-3: 0.8})
        0.003
    """
    return max(sorted(means), key=lambda rate: means[rate] if math.isfinite(means[rate]) else -math.inf)


def is_diverged(means: Mapping[float, float]) -> bool:
    """Whether no rate that was tried gave a finite mean."""
    return bool(means) and not math.isfinite(means[best_rate(means)])


def next_rate(grid: Sequence[float], means: Mapping[float, float]) -> float | None:
    """The rate to try as well, since the best so far is at the edge; None if it is not, or `MOST` were added there.

    Args:
        grid: as it was given, from the lowest to the highest; its own factor at that side gives the next one. One rate
            alone has no factor, and is no grid to extend.
        means: of all rates that were tried.

    Example:
        >>> next_rate([1e-3, 3e-3], {1e-3: 0.7, 3e-3: 0.8})
        0.009
    """
    if len(grid) < 2:
        return None
    best, tried = best_rate(means), sorted(means)
    if best == tried[-1] and sum(rate > grid[-1] for rate in tried) < MOST:
        return _rounded(best * grid[-1] / grid[-2])
    if best == tried[0] and sum(rate < grid[0] for rate in tried) < MOST:
        return _rounded(best * grid[0] / grid[1])
    return None


def is_at_edge(means: Mapping[float, float]) -> bool:
    """Whether the best rate is the lowest or the highest that was tried."""
    return len(means) > 1 and best_rate(means) in (min(means), max(means))


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
