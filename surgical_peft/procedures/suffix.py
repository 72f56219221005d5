"""A frozen suffix of every depth: defrosting from the input end."""

from __future__ import annotations

from ..blocks.block_map import BlockMap
from .procedure import Proposals, procedure


@procedure()
def suffix(blocks: BlockMap) -> Proposals:
    """Freeze the last N repeated layers and all that runs after them; N from all of them down to none.

    All in one round: first only what runs before the first layer (the embeddings), then with it the first layer, the
    first two, and so on to the whole model. A model that begins with its first layer goes without the first.

    Trainings: L + 1 for L repeated layers.

    Source: the mirror image of `prefix` (Gerace et al. 2023, arXiv 2303.01429), for shifts of the input, where the
    early layers are the ones to tune (Lee et al. 2022).

    Example:
        >>> result = run_search(procedures.suffix(), objective)
    """
    bounds = [*(blocks.names.index(name) for name in blocks.layers), len(blocks.names)]  # where the trained part ends
    yield [blocks.names[:bound] for bound in bounds if bound]
    return None
