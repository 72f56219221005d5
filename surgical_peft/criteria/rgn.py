"""Relative gradient norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rgn(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
    """Relative gradient norm `||g||_2 / ||theta||_2`, each norm over all entries of the unit (of the concatenation).

    Range: 0 upwards, no unit. Cost: one forward and backward pass a batch. Undefined where `||theta|| = 0` (a fresh
    zero bias); `score_blocks` leaves such units out of the scores.

    Source: Lee et al. 2022 (arXiv 2210.11466), Auto-RGN. The paper speaks of layers; its code scores every tensor,
    averages the ratio over 5 training batches and divides without a guard. `granularity="tensor"` is the code's way.
    Known limit: on transformers the head nearly always scores highest and the embeddings next, whatever the shift.

    Example:
        >>> rgn([torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 1.0])])
        0.2
    """
    return norm(grads) / norm(weights)


def norm(tensors: Sequence[Tensor]) -> float:
    """The 2-norm of all entries of `tensors` together, summed in at least float32."""
    parts = [torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack([part.to(parts[0].device) for part in parts])).item()


def relative_gradient_norms(units: Sequence[Sequence[Tensor]]) -> list[float]:
    """`rgn` of many units at once, from `parameter.grad`; one transfer to the host however many tensors there are.

    A parameter without a gradient counts as a zero one; a unit whose weights are all zero gives `inf`.
    """
    device = units[0][0].device
    owners = [index for index, unit in enumerate(units) for _ in unit]
    weights = [weight for unit in units for weight in unit]
    held = [(index, weight.grad) for index, weight in zip(owners, weights, strict=True) if weight.grad is not None]

    def squared(tensors: list[Tensor], at: list[int]) -> Tensor:
        total = torch.zeros(len(units), dtype=torch.float32, device=device)
        if tensors:
            norms = torch._foreach_norm([t.detach() for t in tensors], 2, dtype=torch.float32)
            total.index_add_(0, torch.tensor(at, device=device), torch.stack([n.to(device) for n in norms]).square())
        return total

    grads = squared([grad for _, grad in held], [index for index, _ in held])
    sizes = squared(weights, owners)
    return torch.where(sizes > 0, (grads / sizes).sqrt(), torch.inf).tolist()
