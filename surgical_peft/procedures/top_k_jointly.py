"""The best blocks of a sweep together."""

from __future__ import annotations

from typing import Any

from ..blocks.block_map import BlockMap
from ..validation import check_count
from .procedure import Blocks, Proposals, best_of, check_fits, layers, procedure


def _check(num_blocks: int, **_: Any) -> None:
    check_count("top_k_jointly", "num_blocks", num_blocks, "blocks together")


@procedure(_check)
def top_k_jointly(blocks: BlockMap, num_blocks: int, candidates: Blocks | None = None) -> Proposals:
    """Every block alone, then the two best of them together, the three best, and so on up to `num_blocks`.

    Two rounds. Of equals the earlier block ranks higher; a block whose trial failed is not taken, so there may be
    fewer than `num_blocks`. The best single block was trained in the first round and is not trained again.

    Args:
        num_blocks: the largest number of blocks together, at least 1.
        candidates: the blocks to try, as `BlockMap.parse` takes them; default the repeated layers.

    Trainings: L + K - 1 for L candidates and `num_blocks` K.

    Source: the "top-k jointly" grouping of Barakat and Huang 2023 (arXiv 2301.06133), whose k was not to be found.

    Example:
        >>> result = run_search(procedures.top_k_jointly(3), objective)
    """
    names = layers(blocks, candidates)
    check_fits("top_k_jointly", "num_blocks", num_blocks, names)
    metrics = dict(zip(names, (yield [(name,) for name in names]), strict=True))
    ranked: list[str] = []
    while len(ranked) < num_blocks:
        left = [name for name in names if name not in ranked]
        best = best_of([metrics[name] for name in left])
        if best is None:
            break
        ranked.append(left[best])
    together = [tuple(name for name in names if name in ranked[:k]) for k in range(2, len(ranked) + 1)]
    if together:
        yield together
    return None
