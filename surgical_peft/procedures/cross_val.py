"""A few coarse groups and the whole model: Lee's Cross-Val."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from ..blocks.block_map import BlockMap
from ..validation import check_count
from .procedure import Candidate, Proposals, procedure
from .segments import equal_parts

_PARTS = 3  # residual stages of the CIFAR nets in the paper


def _check(parts: int | None) -> None:
    if parts is not None:
        check_count("cross_val", "parts", parts, "parts of the repeated layers")


@procedure(_check)
def cross_val(blocks: BlockMap, parts: int | None = None) -> Proposals:
    """Cut the whole model into a few coarse groups and tune one at a time, first one first, then the whole model.

    All in one round. The groups hold every block once: the repeated layers in equal parts, the first with the
    embeddings; and last what follows the last layer (final norm and head). Rates are not proposed: the paper tries
    each candidate at every rate, so give them to the search.

    Args:
        parts: into how many parts the repeated layers are cut; default one for each stack where there are several,
            such as the stages of a hierarchical net or encoder and decoder, else 3 (fewer if there are fewer layers).

    Trainings: `parts` + 2, times the number of rates (one less if nothing follows the last layer).

    Source: Cross-Val of Lee et al. 2022 (arXiv 2210.11466). Its code offers conv1 with the first stage, the other
    stages, the last layer, and all: 5 on CIFAR and 6 on ImageNet-C, at 5 rates each; 25 to 30 trainings. For
    a CLIP ViT the paper tries embeddings, the first three and the last three layers and the last layer.

    Example:
        >>> result = run_search(procedures.cross_val(parts=4), objective, rates=[1e-4, 1e-3])
    """
    names = blocks.layers
    if parts is None and len(blocks.stacks) > 1:
        stacks = ([name for name in stack if name in names] for stack in blocks.stacks.values())
        within = [tuple(stack) for stack in stacks if stack]
    else:
        within = equal_parts("cross_val", names, parts or min(_PARTS, len(names)))
    yield list(dict.fromkeys([*_groups(blocks, within), blocks.names]))
    return None


def _groups(blocks: BlockMap, parts: list[Candidate]) -> Iterator[Candidate]:
    """The parts of the layers with all that lies between them, and what follows the last layer.

    Embeddings between two layers, such as those of a stage, go with the layer after them, all else with the one
    before.
    """
    names, begins = blocks.names, [0]
    for part in parts[1:]:
        begin = names.index(part[0])
        while blocks.kind(names[begin - 1]) == "embeddings":
            begin -= 1
        begins.append(begin)
    bounds = [*begins, names.index(parts[-1][-1]) + 1, len(names)]
    for start, stop in pairwise(bounds):
        if names[start:stop]:
            yield names[start:stop]
