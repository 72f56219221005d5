"""Signal-to-noise ratio of the gradient over examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .criterion import Moments, over_examples


@over_examples()
def snr(weights: Sequence[Tensor], moments: Moments) -> float:
    """`mean_n(g)^2 / Var_n(g)` over the examples `n`, averaged over the entries of the unit.

    The variance is divided by the number of examples. An entry whose gradient is zero in all examples counts as 0; the
    ratio of one that is the same in all of them is bounded by the precision of float32. Two examples at least.

    Range: 0 upwards, no unit; of pure noise over N examples about 1/N. Cost: one forward and backward pass for every
    single example, two float32 numbers for each weight (`memory="low"` keeps them for one group of units at a time).

    Source: Auto-SNR of Lee et al. 2022 (arXiv 2210.11466), after Mahsereci et al. Known disagreement: the paper's code
    does not look at examples at all; what it computes is `eb`.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="snr")
    """
    total = entries = 0.0
    for mean, variance in zip(moments.means, moments.variances, strict=True):
        square = mean.square()
        floor = torch.finfo(mean.dtype).eps * (variance + square)
        ratio = (square / torch.maximum(variance, floor)).nan_to_num_(nan=0.0)  # 0 / 0 where no example has a gradient
        total += ratio.sum(dtype=torch.float64).item()
        entries += mean.numel()
    return total / entries
