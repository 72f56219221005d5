"""The score that the released code of Auto-SNR computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def eb(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
    """`g^2 / (Var(g) + 1e-8)` of a batch's gradient, the variance over its dimension 0, averaged over the entries.

    The variance is torch's (divided by n - 1), of output channels and not of examples; along a dimension of one entry,
    or of none, it is 0. The code freezes what scores less than 0.95: `above(scores, 0.95)`.

    Range: 0 upwards, no unit. Cost: one forward and backward pass a batch, no memory of its own. The constant makes it
    depend on the scale of the loss.

    Source: code of Lee et al. 2022 (anniesch/surgical-finetuning, `main.py`, "eb-criterion"), which scores each tensor
    (`granularity="tensor"`). Known disagreement: the paper describes `snr`.

    Example:
        >>> eb([torch.ones(2, 1)], [torch.tensor([[1.0], [3.0]])])  # (1 + 9) / 2 / 2
        2.499999987500...
    """
    total = entries = 0.0
    for grad in grads:
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        channels = grad.shape[0] if grad.ndim else 1
        variance = grad.var(dim=0, keepdim=True) if channels > 1 else torch.zeros_like(grad)
        total += (grad.square() / (variance + 1e-8)).sum(dtype=torch.float64).item()
        entries += grad.numel()
    return total / entries
