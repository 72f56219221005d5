"""Predicted gain of one step of Adam on data that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .adam_gain import gain
from .criterion import Moments, over_batches


@over_batches(parts=2, batches=16)
def held_out_gain(weights: Sequence[Tensor], train: Moments, held_out: Moments) -> float:
    """As `adam_gain`, but the step comes from one half of the batches and its effect is read off the other half.

    `sum m' m / sqrt(mean g^2)` over the entries, `m` and `g` of every second batch, `m'` of those between, and the
    same with the halves exchanged; the mean of both. Noise is independent in the halves and cancels.

    Range: any number, below zero where the halves pull apart; unit: loss by learning rate. Cost: one forward and
    backward pass a batch (at least two), four float32 numbers for each weight (`memory="low"`: for one group of units
    at a time).

    Source: ours. Known disagreement: none.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="held_out_gain", num_batches=16)
    """
    parts = ((train, held_out), (held_out, train))
    gains = [
        gain(pull, mean, square)
        for one, other in parts
        for pull, mean, square in zip(other.means, one.means, one.squares, strict=True)
    ]
    return sum(gains) / 2
