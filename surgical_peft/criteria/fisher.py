"""Empirical Fisher information."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .criterion import Moments, over_examples


@over_examples()
def fisher(weights: Sequence[Tensor], moments: Moments) -> float:
    """Diagonal empirical Fisher information: sum over the unit's tensors of `||mean_n(g_n^2)||_2` over the examples.

    `g_n` is the gradient of example `n`'s loss: for a classifier minus the log-probability of its true label (of a
    language model, the mean over its tokens). Every example of the batches counts once, with its attention mask.

    Range: 0 upwards; unit: squared loss by squared weight. Cost: one forward and backward pass for every single
    example, two float32 numbers for each weight (`memory="low"`: for one group of units at a time). The paper looks at
    about 100 examples.

    Source: Lodha et al. 2023 (arXiv 2310.17041). Known disagreements of their code (ymtao5219/surgical_fine_tuning):
    it differentiates the true label's logit and not its log-probability, takes the first example over and over, and
    leaves the attention mask out. None of that is copied.

    Example:
        >>> scores = score_blocks(model, DataLoader(dataset, batch_size=20), criterion="fisher", num_batches=5)
    """
    return sum(torch.linalg.vector_norm(square.double()).item() for square in moments.squares)
