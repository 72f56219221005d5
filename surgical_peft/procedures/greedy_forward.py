"""Greedy selection: one more block a round, as long as it pays."""

from __future__ import annotations

import math
from typing import Any

from ..blocks.block_map import BlockMap
from ..validation import check_count, check_number
from .procedure import Blocks, Candidate, Proposals, best_of, check_fits, falls_short, layers, procedure


def _check(num_blocks: int | None, epsilon: float, **_: Any) -> dict[str, Any]:
    if num_blocks is not None:
        check_count("greedy_forward", "num_blocks", num_blocks, "blocks at most")
    check_number("greedy_forward", "epsilon", epsilon, "in the unit of the metric, a finite number", at_least=0)
    return {"epsilon": float(epsilon)}


@procedure(_check)
def greedy_forward(
    blocks: BlockMap, num_blocks: int | None = None, epsilon: float = 0.01, candidates: Blocks | None = None
) -> Proposals:
    """From no block: try each of the others with those taken so far, take the best, until the gain is below `epsilon`.

    A round tries every block that is not yet taken; its best is taken unless it gains less than `epsilon` on what the
    best of the round before reached. The first round's best is taken whatever it reached. What has been taken when a
    round falls short, fails as a whole, or `num_blocks` is reached, is chosen.

    Args:
        num_blocks: at most so many; None = as many as pay.
        epsilon: the least gain, 0 or more, in the unit of the metric: 0.01 is a point of an accuracy from 0 to 1, and
            far too little for one from 0 to 100. With 0 a block that changes nothing is taken.
        candidates: the blocks to choose from, as `BlockMap.parse` takes them; default the repeated layers.

    Trainings: L + (L - 1) + ... for L candidates: k + 1 rounds to take k blocks, k if `num_blocks` ends it, at most
    L (L + 1) / 2 in all.

    Source: SubTuning, Kaplun et al. 2023 (arXiv 2302.06354). Known disagreement: the paper stops when the marginal
    gain is below epsilon, as here; its code goes on while the metric is at least the best so far less epsilon. The
    paper does not say which epsilon it used; 0.01 is that of its script for ViT.

    Example:
        >>> result = run_search(procedures.greedy_forward(num_blocks=3), objective)
    """
    names = layers(blocks, candidates)
    check_fits("greedy_forward", "num_blocks", num_blocks or 0, names)
    return (yield from grow(names, num_blocks, epsilon))


def grow(names: Candidate, num_blocks: int | None, epsilon: float) -> Proposals:
    """The rounds of `greedy_forward` over `names`."""
    taken: Candidate = ()
    reached = -math.inf
    while len(taken) < (num_blocks or len(names)):
        tried = [tuple(name for name in names if name in (*taken, new)) for new in names if new not in taken]
        metrics = yield tried
        best = best_of(metrics)
        if best is None or falls_short(metrics[best], reached, epsilon):
            break
        taken, reached = tried[best], metrics[best]
    return taken or None
