"""A window of blocks that moves over the depth."""

from __future__ import annotations

from typing import Any

from ..blocks.block_map import BlockMap
from ..validation import check_count
from .procedure import Blocks, Proposals, check_fits, layers, procedure


def _check(width: int, stride: int, **_: Any) -> None:
    check_count("windows", "width", width, "blocks in a window")
    check_count("windows", "stride", stride, "blocks from window to window")


@procedure(_check)
def windows(blocks: BlockMap, width: int, stride: int = 1, candidates: Blocks | None = None) -> Proposals:
    """Tune `width` neighboring blocks at a time, from the output end down.

    All in one round: the last `width` blocks, then those `stride` further down, as long as a whole window fits.

    Args:
        width: blocks in a window, at least 1.
        stride: from window to window, at least 1.
        candidates: the blocks to move over, as `BlockMap.parse` takes them; default the repeated layers.

    Trainings: (L - width) // stride + 1 for L candidates.

    Source: the "sliding window" grouping of Barakat and Huang 2023 (arXiv 2301.06133), searched from the output end;
    their width and stride were not to be found.

    Example:
        >>> result = run_search(procedures.windows(width=3), objective)
    """
    names = layers(blocks, candidates)
    check_fits("windows", "width", width, names)
    yield [names[start : start + width] for start in range(len(names) - width, -1, -stride)]
    return None
