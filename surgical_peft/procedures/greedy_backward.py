"""Greedy elimination: one block fewer a round, as long as it does no harm."""

from __future__ import annotations

import math
from typing import Any

from ..blocks.block_map import BlockMap
from ..validation import check_number
from .procedure import Blocks, Proposals, best_of, falls_short, layers, procedure


def _check(epsilon: float, **_: Any) -> dict[str, Any]:
    check_number("greedy_backward", "epsilon", epsilon, "in the unit of the metric, a finite number")
    return {"epsilon": float(epsilon)}


@procedure(_check)
def greedy_backward(blocks: BlockMap, epsilon: float = 0.0, candidates: Blocks | None = None) -> Proposals:
    """From all blocks: try leaving out each, leave out the best to miss, until the gain is below `epsilon`.

    The first round is all blocks together. Each later one tries every set with one block fewer, never the empty one;
    its best is kept unless it gains less than `epsilon` on the best so far. The set that is left when a round falls
    short, fails as a whole, or a single block remains, is chosen. Of equals the earlier block is left out. If the
    trial of all blocks fails, the best of the next round is kept whatever it reached.

    Args:
        epsilon: the least gain, in the unit of the metric. 0 leaves out whatever is not missed, more than 0 only what
            does harm; below 0 is the loss against the best so far that is put up with for fewer blocks.
        candidates: the blocks to begin with, as `BlockMap.parse` takes them; default the repeated layers.

    Trainings: at most L (L + 1) / 2 for L candidates.

    Source: backward elimination, as in the shipped ViT script of SubTuning (Kaplun et al. 2023, arXiv 2302.06354), by
    the paper's rule: stop when the gain is below epsilon. Known disagreement: its code goes on while the metric is at
    least the best so far less epsilon; that is `epsilon=-0.01` here.

    Example:
        >>> result = run_search(procedures.greedy_backward(epsilon=-0.01), objective)
    """
    left = layers(blocks, candidates)
    [metric] = yield [left]
    chosen, reached = (None, -math.inf) if math.isnan(metric) else (left, metric)
    while len(left) > 1:
        tried = [tuple(name for name in left if name != gone) for gone in left]
        metrics = yield tried
        best = best_of(metrics)
        if best is None or falls_short(metrics[best], reached, epsilon):
            break
        chosen = left = tried[best]
        reached = max(reached, metrics[best])
    return chosen
