"""Every block alone: the finetuning profile."""

from __future__ import annotations

from ..blocks.block_map import BlockMap
from .procedure import Blocks, Proposals, layers, procedure


@procedure()
def sweep(blocks: BlockMap, candidates: Blocks | None = None) -> Proposals:
    """Every block alone, then all blocks of the model together, then the head: the finetuning profile.

    All in one round. The last two are the references: full fine-tuning and linear probing. A model whose head is tied
    to its embeddings has no head of its own and goes without the last.

    Args:
        candidates: the blocks to try, as `BlockMap.parse` takes them; default the repeated layers. `"all"` tries
            embeddings, final norm and head too.

    Trainings: L + 2 for L candidates (one less if the head is one of them, or if there is none).

    Source: the finetuning profile of SubTuning (Kaplun et al. 2023, arXiv 2302.06354) and the layer-wise adaptation of
    Barakat and Huang 2023 (arXiv 2301.06133). Both leave embeddings and final norm out; Lee et al. 2022 try the
    embeddings too.

    Example:
        >>> result = run_search(procedures.sweep("all"), objective)
    """
    alone = [(name,) for name in layers(blocks, candidates)]
    heads = blocks.heads
    yield list(dict.fromkeys([*alone, blocks.names, *([heads] if heads else [])]))
    return None
