"""Gradient norm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .rgn import norm


def grad_norm(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
    """Gradient norm `||g||_2` over all entries of the unit, mean over the batches.

    Range: 0 upwards; unit: loss by weight. Cost: one forward and backward pass a batch, no memory of its own. It grows
    with the number of weights, so large blocks come first.

    Source: the score of AdaGradSelect (arXiv 2512.15764) and the numerator of Auto-RGN (Lee et al. 2022).
    Known disagreement: none; AdaGradSelect's exact rule is not published in what we could read.

    Example:
        >>> grad_norm([torch.ones(2)], [torch.tensor([3.0, 4.0])])
        5.0
    """
    return norm(grads)
