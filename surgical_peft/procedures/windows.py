"""A window of blocks that moves over the depth."""

from __future__ import annotations

from ..blocks.block_map import BlockMap
from ..validation import check_count
from .procedure import Blocks, Procedure, Proposals, check_fits, layers, plain


def windows(width: int, stride: int = 1, candidates: Blocks | None = None) -> Procedure:
    """Tune `width` neighbouring blocks at a time, from the output end down.

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
    check_count("windows", "width", width, "blocks in a window")
    check_count("windows", "stride", stride, "blocks from window to window")
    return Procedure("windows", _windows, {"width": width, "stride": stride, "candidates": plain(candidates)})


def _windows(blocks: BlockMap, width: int, stride: int, candidates: Blocks | None) -> Proposals:
    names = layers(blocks, candidates)
    check_fits("windows", "width", width, names)
    yield [names[start : start + width] for start in range(len(names) - width, -1, -stride)]
    return None
