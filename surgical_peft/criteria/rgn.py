"""Relative gradient norm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def rgn(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
    """Relative gradient norm `||g||_2 / ||theta||_2`, each norm over all entries of the unit (of the concatenation).

    Range: 0 upwards, no unit. Cost: one forward and backward pass a batch. Undefined where `||theta|| = 0` (a fresh
    zero bias); `score_blocks` leaves such units out of the scores.

    Source: Lee et al. 2022 (arXiv 2210.11466), Auto-RGN. The paper speaks of layers; its code scores every tensor,
    averages the ratio over 5 training batches and divides without a guard. `granularity="tensor"` is the code's way.
    Known limit: on transformers the head and the embeddings score highest, whatever the shift.

    Example:
        >>> rgn([torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 1.0])])
        0.2
    """
    return norm(grads) / norm(weights)


def norm(tensors: Sequence[Tensor]) -> float:
    """The 2-norm of all entries of `tensors` together, summed in at least float32."""
    return torch.linalg.vector_norm(piece_norms(tensors)).item()


def piece_norms(tensors: Sequence[Tensor], size: int = 2**14) -> Tensor:
    """The norms of the `pieces` of all tensors, in any order.

    Those of a large tensor in one call: on the CPU as fast as memory is read, twice as fast as a call for each piece.
    Of 16-bit tensors this would make 32-bit copies first, which takes longer.
    """
    dtype = _at_least_float32(tensors)
    norms, rest = [], []
    for tensor in tensors:
        if tensor.is_cpu and tensor.is_contiguous() and tensor.dtype == dtype and tensor.numel() >= size:
            flat = tensor.view(-1)
            whole = flat.numel() // size * size
            norms.append(torch.linalg.vector_norm(flat[:whole].view(-1, size), dim=1))
            rest += [flat[whole:]] if whole < flat.numel() else []
        else:
            rest += pieces([tensor], size)
    norms += [norm.view(1) for norm in foreach_norm(rest, dtype)] if rest else []
    return torch.cat([norm.to(norms[0].device) for norm in norms])


def pieces(tensors: Sequence[Tensor], size: int = 2**14) -> list[Tensor]:
    """Views to take norms of: on the CPU, the float32 norm of one tensor of 25 million entries is 0.1 % wrong."""
    return [
        piece
        for tensor in tensors
        for piece in (tensor.view(-1).split(size) if tensor.is_cpu and tensor.is_contiguous() else [tensor])
    ]


def foreach_norm(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The 2-norm of each tensor in at least float32, in one call."""
    return list(torch._foreach_norm(tensors, 2, dtype=dtype or _at_least_float32(tensors)))


def _at_least_float32(tensors: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)
