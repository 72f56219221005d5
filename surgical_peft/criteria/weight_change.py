"""Distance that weights move in a short training of everything."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .criterion import of_model, whole
from .rgn import norm
from .short_training.context import ScoringContext


@of_model(batches=16)
def weight_change(context: ScoringContext, *, steps: int = 16, rate: float = 1e-4) -> dict[str, float]:
    """`||W - W_0||_2 / n` after `steps` steps of Adam on all units together, the rate falling to 0, `n` the number of
    the unit's weights.

    Range: 0 upwards; unit: that of a weight. Cost: `steps` training steps, a copy of the weights, Adam's two numbers
    and a gradient for each.

    Source: AutoLR, Ro and Choi 2021 (arXiv 2002.06048), which measures it over an epoch. Known disagreement: AutoLR
    rolls an epoch back until the changes grow with depth; this is its measure only. Under Adam all weights move at
    about one pace, so the score mostly falls with the size of the unit.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="weight_change")
    """
    return context.moved(change, steps, rate)


def change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """2-norm of the difference of two lists of tensors, by the number of their entries."""
    moves = [whole(new - old) for new, old in zip(after, before, strict=True)]
    return norm(moves) / sum(move.numel() for move in moves)
