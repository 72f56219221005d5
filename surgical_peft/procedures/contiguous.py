"""Every span of neighboring blocks."""

from __future__ import annotations

from ..blocks.block_map import BlockMap
from .procedure import Blocks, Proposals, layers, procedure


@procedure()
def contiguous(blocks: BlockMap, candidates: Blocks | None = None) -> Proposals:
    """Every span of neighboring blocks, from single blocks to all of them.

    All in one round: the shorter spans first, and of one length those nearer the input; so of equals the fewer and
    earlier blocks win.

    Args:
        candidates: the blocks to take spans of, as `BlockMap.parse` takes them; default the repeated layers.

    Trainings: L (L + 1) / 2 for L candidates: 78 for 12.

    Source: the whole space of Lee et al. 2022 (arXiv 2210.11466), who tune a contiguous part of the model and try a
    few of them by hand.

    Example:
        >>> result = run_search(procedures.contiguous("-4:"), objective)
    """
    names = layers(blocks, candidates)
    yield [names[start : start + n] for n in range(1, len(names) + 1) for start in range(len(names) - n + 1)]
    return None
