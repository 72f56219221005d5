"""Predicted gain of one step of Adam."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import SurgicalError
from .budget import GRADIENTS
from .criterion import NO_GRADIENT, Moments, not_finite, over_batches, tell_unreached, whole
from .short_training.context import ScoringContext


@over_batches(batches=8)
def adam_gain(weights: Sequence[Tensor], moments: Moments) -> float:
    """By how much one step of Adam on this unit alone would lower the loss, to first order and by its learning rate.

    `sum m^2 / sqrt(mean g^2)` over the entries, `m` the mean of the batches' gradients: Adam moves an entry by
    `m / sqrt(mean g^2)`, and the loss changes by that times the gradient. Entries without a gradient count as 0.

    Range: 0 upwards; unit: loss by learning rate. Cost: one forward and backward pass a batch, two float32 numbers for
    each weight (`memory="low"`: for one group of units at a time). Noise counts as gain, more so in large units:
    `held_out_gain` takes it out.

    Source: ours, from Adam's update (Kingma and Ba 2015). Known disagreement: none.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="adam_gain", num_batches=8)
    """
    return sum(gain(mean, mean, square) for mean, square in zip(moments.means, moments.squares, strict=True))


def gain(pull: Tensor, mean: Tensor, square: Tensor) -> float:
    """`sum pull * mean / sqrt(square)`; entries with `square` 0 count as 0."""
    step = torch.where(square > 0, mean * square.rsqrt(), 0.0)
    return whole((pull * step).sum(dtype=torch.float64)).item()


def gains_of(context: ScoringContext, ats: Sequence[int]) -> tuple[dict[str, float], float]:
    """`adam_gain` of each unit that has a gradient on some batches, and their mean loss; leaves no gradient behind.

    Raises:
        SurgicalError: a loss or a gradient that is NaN or infinite; no unit has a gradient.
    """
    moments = {name: Moments(list(unit.values())) for name, unit in context.units.items()}
    total = 0.0
    for at in ats:
        loss = context.loss(at)
        if not math.isfinite(loss.item()):
            raise not_finite("loss", "batch", at)
        total += loss.item()
        loss.backward()
        for name, unit in context.units.items():
            grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in unit.values()]
            if not all(bool(torch.linalg.vector_norm(grad, math.inf).isfinite()) for grad in grads):
                raise not_finite(f"gradient of {name!r}", "batch", at)
            moments[name].update(grads, at)
            for weight in unit.values():
                weight.grad = None
    gains = context.agreed({name: adam_gain([], part) for name, part in moments.items()})
    if not any(gains.values()):
        raise SurgicalError(
            f"no unit has a gradient: the loss does not depend on any weight that is scored. {NO_GRADIENT}"
        )
    tell_unreached([name for name, gain in gains.items() if not gain], gains)
    return {name: gain for name, gain in gains.items() if gain}, context.agreed({"loss": total / len(ats)})["loss"]


def gains_of_all(context: ScoringContext) -> tuple[dict[str, float], float]:
    """`gains_of` all batches, computed once.

    Raises:
        SurgicalError: a loss or a gradient that is NaN or infinite.
    """
    if "gains" not in context.known:
        count = len(context.batches)
        context.budget.stage(f"gradients of {count} batch{'es' * (count > 1)}", GRADIENTS * count)
        context.known["gains"] = gains_of(context, range(count))
    return context.known["gains"]
