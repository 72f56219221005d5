"""The model cut into segments, one tuned at a time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ..blocks.block_map import BlockMap
from ..errors import SurgicalError
from ..validation import check_count
from .procedure import Blocks, Candidate, Proposals, check_fits, layers, procedure


def _check(parts: int | None, cuts: Blocks | None, **_: Any) -> None:
    if (parts is None) == (cuts is None):
        raise SurgicalError(f"segments needs parts or cuts, one of the two, not parts={parts} and cuts={cuts}.")
    if parts is not None:
        check_count("segments", "parts", parts, "equal parts")


@procedure(_check)
def segments(
    blocks: BlockMap, parts: int | None = None, cuts: Blocks | None = None, candidates: Blocks | None = None
) -> Proposals:
    """Cut the blocks into segments of neighbors and tune one segment at a time, the one nearest the output first.

    All in one round. For attention and MLP apart, give the search `blocks.divided(["attention", "mlp"])`: then each
    layer counts as two, and as many parts as there are of those make segments of one attention or MLP each.

    Args:
        parts: into how many equal parts; where that does not come out even, sizes differ by one.
        cuts: or the blocks at which a new segment begins, as `BlockMap.parse` takes them. One of the two.
        candidates: the blocks to cut up, as `BlockMap.parse` takes them; default the repeated layers.

    Trainings: one a segment.

    Source: the "block segmentation" grouping of Barakat and Huang 2023 (arXiv 2301.06133). They cut where a layer
    without weights lies (pooling, activation) and search from the output end; such places say nothing in a
    transformer, so the cuts are the user's.

    Example:
        >>> result = run_search(procedures.segments(cuts=[3, 9]), objective)  # layers 9 to 11, 3 to 8, 0 to 2
    """
    names = layers(blocks, candidates)
    if parts is not None:
        yield equal_parts("segments", names, parts)[::-1]
        return None
    begins = layers(blocks, cuts)
    for name in begins:
        if name not in names:
            raise SurgicalError(f"cuts={cuts!r}: {name!r} is not among what is cut up: {', '.join(names)}.")
    starts = sorted({0, *(names.index(name) for name in begins)})
    yield [names[start:stop] for start, stop in pairwise([*starts, len(names)])][::-1]
    return None


def equal_parts(owner: str, names: Candidate, parts: int) -> list[Candidate]:
    """Neighbors together, as many parts as asked for, first one first; their sizes differ by one at most."""
    check_fits(owner, "parts", parts, names)
    bounds = [number * len(names) // parts for number in range(parts + 1)]
    return [names[start:stop] for start, stop in pairwise(bounds)]
