"""Chance, the control of every comparison."""

from __future__ import annotations

import random as chance

from .criterion import of_model
from .short_training.context import ScoringContext


@of_model(batches=0)
def random(context: ScoringContext, *, seed: int = 0) -> dict[str, float]:
    """A number between 0 and 1 for each unit, by chance: the control that any other criterion has to beat.

    Range: 0 to 1, no unit. Cost: none, no data. The same `seed` and units give the same scores.

    Source: the random selections of LISA (arXiv 2403.17919), LIFT and HFT as a criterion. Known disagreement: none.

    Example:
        >>> from functools import partial
        >>> scores = score_blocks(model, None, criterion=partial(criteria.random, seed=3))
    """
    source = chance.Random(seed)
    return {name: source.random() for name in context.units}
