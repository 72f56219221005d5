"""Angle by which weights turn in a short training of everything."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .criterion import of_model, whole
from .short_training.context import ScoringContext


@of_model(batches=16)
def angle(context: ScoringContext, *, steps: int = 16, rate: float = 1e-4) -> dict[str, float]:
    """Angle between a unit's weights, as one vector, before and after `steps` steps of Adam on all units together, the
    rate falling to 0.

    Range: 0 to 180 degrees. Cost: as `weight_change`.

    Source: FAPFT, partial fine-tuning (arXiv 2312.15681), which compares with a finished fine-tuning and tunes layers
    with large angles on hard tasks, with small ones on easy tasks. Known disagreement: here, larger always means "tune
    it", and the training is short.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="angle")
    """
    return context.moved(degrees, steps, rate)


def degrees(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The angle between two lists of tensors, each as one vector; exact for small angles too (Kahan)."""
    u, v = (
        torch.cat([whole(tensor.detach()).double().flatten().cpu() for tensor in tensors])
        for tensors in (before, after)
    )
    u, v = u / u.norm(), v / v.norm()
    return math.degrees(2 * math.atan2((u - v).norm().item(), (u + v).norm().item()))
