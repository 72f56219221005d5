"""Decorators that say what a criterion needs: gradients of each batch, moments over samples, or the whole model."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..errors import SurgicalError, first_of

NO_GRADIENT = (
    "Look at the labels and at loss_fn; a head of zeros lets no gradient through, and a contrastive loss needs "
    "batches of several examples."
)

GIVEN_UP, GUESSED = "given up", "guessed"  # what the score of a unit is that was not measured to the end

Criterion = Callable[..., Any]
C = TypeVar("C", bound=Criterion)


@dataclass(frozen=True)
class Needs:
    """The input that a criterion asks `score_blocks` for.

    Attributes:
        what: `"gradients"`: called for every unit and batch, `(weights, grads) -> float`, averaged over the batches.
            `"moments"`: called once for every unit, `(weights, *moments) -> float`. `"model"`: called once,
            `(context: ScoringContext) -> {unit: score}`.
        samples: the samples of the moments: the gradients of `"batches"`, or of single `"examples"`.
        decay: 1 = plain moments; less = exponential ones, of weight `decay ** (number of later samples)`.
        parts: number of `Moments`; samples go to them in turn.
        batches: default number of batches; 0 = no data needed.
    """

    what: str = "gradients"
    samples: str = "batches"
    decay: float = 1.0
    parts: int = 1
    batches: int = 5


def range_of(criterion: Criterion) -> str | None:
    """Range and unit of the scores, as the docstring of a criterion has them after `Range:`, up to the first stop.

    Example:
        >>> range_of(criteria.rgn)
        '0 upwards, no unit'
    """
    text = " ".join((inspect.getdoc(criterion) or "").split())
    return found[1] if (found := re.search(r"\bRange: (.*?)\.(?: |$)", text)) else None


def over_batches(*, decay: float = 1.0, parts: int = 1, batches: int = 5) -> Callable[[C], C]:
    """Mark a criterion `(weights, *moments) -> float` of the gradients of batches.

    Args:
        decay: 1 = plain moments; less = exponential ones, a batch weighing `decay ** (number of later batches)`.
        parts: how many `Moments` the criterion takes; batches go to them in turn.
        batches: default number of batches.

    Example:
        >>> @over_batches()
        ... def mean_gradient_norm(weights, moments):
        ...     return norm(moments.means)
    """
    return _marked(Needs("moments", "batches", decay, parts, batches))


def over_examples(*, batches: int = 5) -> Callable[[C], C]:
    """Mark a criterion `(weights, moments) -> float` of the gradients of single examples."""
    return _marked(Needs("moments", "examples", batches=batches))


def of_model(*, batches: int) -> Callable[[C], C]:
    """Mark a criterion `(context) -> {unit: score}` that needs more than gradients; `batches=0`: no data at all."""
    return _marked(Needs("model", batches=batches))


def _marked(needs: Needs) -> Callable[[C], C]:
    def mark(criterion: C) -> C:
        criterion.needs = needs  # type: ignore[attr-defined]
        return criterion

    return mark


def needs_of(criterion: Criterion) -> Needs:
    """Return the needs of a criterion, also inside `functools.partial`; a plain function gets gradients."""
    while isinstance(criterion, partial):
        criterion = criterion.func
    return getattr(criterion, "needs", Needs())


class Moments:
    """Weighted mean and variance of a unit's gradient, entry by entry, one sample at a time (Welford's update).

    Memory: two float32 numbers for each weight.

    Attributes:
        means: for each weight of the unit the mean gradient, in its shape.
        squares: for each weight the mean squared gradient, entry by entry, in its shape.
        variances: for each weight the variance of the gradient, likewise; an error with fewer than two samples.
        count: number of samples.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float = 1.0) -> None:
        self.decay = decay
        self.count = 0
        self.total = 0.0  # sum of the samples' weights
        self._at = 0
        self.means = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
        self._spreads = [torch.zeros_like(mean) for mean in self.means]

    def update(self, grads: Sequence[Tensor], position: int) -> None:
        """Add the gradient of the sample at `position` in the order of all samples."""
        self.fade(position)
        self.count += 1
        self.total += 1.0
        for mean, spread, grad in zip(self.means, self._spreads, grads, strict=True):
            delta = grad.to(mean.dtype) - mean
            mean.add_(delta, alpha=1.0 / self.total)
            spread.addcmul_(delta, grad.to(mean.dtype) - mean)

    def fade(self, position: int) -> None:
        """Decay the sums to `position`."""
        if self.decay != 1.0:
            factor = self.decay ** (position - self._at)
            self.total *= factor
            for spread in self._spreads:
                spread.mul_(factor)
        self._at = position

    def merge(self, count: int, total: float, means: Sequence[Tensor], spreads: Sequence[Tensor]) -> None:
        """Add the moments of another process (Chan et al. 1979), decayed to the same position."""
        if not total:
            return
        share = total / (self.total + total)
        for mean, spread, other_mean, other_spread in zip(self.means, self._spreads, means, spreads, strict=True):
            delta = other_mean - mean
            mean.add_(delta, alpha=share)
            spread.add_(other_spread).addcmul_(delta, delta, value=self.total * share)
        self.count += count
        self.total += total

    @property
    def spreads(self) -> list[Tensor]:
        """Sums of squared distances from the mean."""
        return self._spreads

    @property
    def variances(self) -> list[Tensor]:
        """Variance of each entry over the samples, divided by their number (or sum of weights).

        Raises:
            SurgicalError: fewer than two samples.
        """
        if self.count < 2:
            raise SurgicalError(
                f"the criterion compares a gradient with its variance over the samples, and there is {self.count} "
                "sample: give a larger num_batches, or more examples."
            )
        return [spread / self.total for spread in self._spreads]

    @property
    def squares(self) -> list[Tensor]:
        """Mean squared gradient of each entry."""
        pairs = zip(self._spreads, self.means, strict=True)
        return [torch.addcmul(spread / self.total, mean, mean) for spread, mean in pairs]


def can_train(weight: Tensor) -> bool:
    """True if a weight can have a gradient: integers cannot, nor 8-bit floats, which are packed numbers too."""
    return weight.is_floating_point() and weight.dtype.itemsize > 1


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that FSDP2 has sharded (a collective call); return any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_zero(tensor: Tensor) -> bool:
    """True if all entries are zero. Most tensors show by the first one that they are not: to look at all takes longer.

    Example:
        >>> is_zero(torch.tensor([0.0, 2.0]))
        False
    """
    return not (tensor.numel() and (bool(tensor[(0,) * tensor.ndim]) or bool(tensor.any())))


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 gathered: a forward pass without a backward pass leaves the outermost ones whole.

    The model would go on with those, whatever happens to their shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def not_finite(what: str, kind: str, at: int) -> SurgicalError:
    """The error for a loss or a gradient of the batch or example `at` that is NaN or infinite."""
    return SurgicalError(
        f"the {what} in {kind} {at} is NaN or infinite. Look at that {kind} for bad inputs or labels (a mean over "
        "labels that are all ignored is NaN), or score in float32 or bfloat16 instead of float16."
    )


def tell_unreached(names: Collection[str], among: Collection[str]) -> None:
    """Warn that some units, but not all, have no score because their gradient is zero in every batch."""
    if 0 < len(names) < len(among):
        warnings.warn(
            f"in these batches the loss reaches no weight of {first_of(names)} ({len(names)} without a score): a unit "
            "without a gradient has no score and cannot be chosen.",
            stacklevel=2,
        )
