"""Bias-variance ratio."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .criterion import Moments, over_batches


@over_batches(decay=0.9, batches=16)
def bvr(weights: Sequence[Tensor], moments: Moments) -> float:
    """Sum of the squared mean gradients over the sum of their variances: `sum m^2 / max(sum (s - m^2), 1e-10)`.

    `m` and `s` are exponential means (0.9) of the batches' gradients and of their squares, with Adam's correction for
    the start. Of pure noise it tends to `(1 - 0.9) / (2 * 0.9) = 0.0556`.

    Range: 0 upwards, no unit. Two batches at least; where all are equal, the variance is 0 and the score
    `1e10 * ||g||^2`, as in the code. Cost: one forward and backward pass a batch, two float32 numbers for each weight
    (`memory="low"`: for one group of units at a time).

    Source: BVG-LS, Tomita et al. 2024 (ACCV), `BVG_LS.py` of MaoTomita/BVG-LS, which computes it from the gradients of
    training itself (`policies.bvg_ls`). Known disagreement: the paper's own text could not be read; this is the code.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="bvr", num_batches=16)
    """
    bias = sum(mean.square().sum(dtype=torch.float64).item() for mean in moments.means)
    variance = sum(part.sum(dtype=torch.float64).item() for part in moments.variances)
    return bias / max(variance, 1e-10)
