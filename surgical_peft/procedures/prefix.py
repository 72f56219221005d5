"""A frozen prefix of every depth: incremental defrosting."""

from __future__ import annotations

from ..blocks.block_map import BlockMap
from .procedure import Proposals, procedure


@procedure()
def prefix(blocks: BlockMap) -> Proposals:
    """Freeze the first N repeated layers and all that runs before them; N from all of them down to none.

    All in one round: first only what follows the last layer (final norm and head), then with it the last layer, the
    last two, and so on to the whole model. A model that ends with its last layer goes without the first.

    Trainings: L + 1 for L repeated layers.

    Source: incremental layer defrosting, Gerace et al. 2023 (arXiv 2303.01429). The N of the best trial is the optimal
    transfer depth. Each depth is a training of its own from the same start; for one run that thaws as it goes see
    `policies.gradual_unfreezing`. The embeddings are frozen with the first layer, so that N = 0 is full fine-tuning.

    Example:
        >>> result = run_search(procedures.prefix(), objective)
    """
    bounds = [0, *(blocks.names.index(name) + 1 for name in blocks.layers)]  # where the trained part begins
    yield [blocks.names[bound:] for bound in reversed(bounds) if blocks.names[bound:]]
    return None
