"""Two-stage fine-tuning for classes of unequal size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import SurgicalError
from .stages import Stage, Stages


def two_stage(counts: Sequence[int], epochs: int, lr_multiplier: float = 1.0, hard: bool = True) -> Stages:
    """The head alone under a class-balanced loss for `epochs` epochs, then everything under the model's own loss.

    Needs `SurgicalCallback` among the Trainer's callbacks, and a head among the tuned blocks.

    Args:
        counts: training examples of each class, for [`ClassBalancedLoss`][surgical_peft.policies.ClassBalancedLoss].
        epochs: length of the first stage.
        lr_multiplier: factor on the learning rate in the first stage.
        hard: freeze; False = rate 0 only, which saves nothing and works under DDP.

    Source: ValizadehAslani et al. 2022 (arXiv 2207.10858). Its exact re-weighting, rates and epochs were not to be
    found.

    Example:
        >>> optimizer = surgical_optimizer(args, policy=policies.two_stage(counts=[900, 100], epochs=2))
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=optimizer, callbacks=[SurgicalCallback()])
    """
    first = Stage("head", epochs=epochs, lr_multiplier=lr_multiplier, loss=ClassBalancedLoss(tuple(counts)))
    return Stages((first, Stage("all")), hard)


@dataclass(frozen=True)
class ClassBalancedLoss:
    """Cross-entropy with the weight `N / (C n_c)` on examples of class `c`: inverse to its count, mean 1 over
    examples.

    For `N` examples of `C` classes, `n_c` of class `c`. Not divided by the weights of the batch, so that its size
    compares with the plain loss. One of several losses of that name; which one two-stage fine-tuning used is not
    known.

    Attributes:
        counts: training examples of each class, in the order of the labels.

    Example:
        >>> Stage("head", epochs=2, loss=ClassBalancedLoss((900, 100)))
    """

    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.counts) < 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.counts):
            raise SurgicalError(f"counts={self.counts} must be the examples of each class, two or more, at least 1.")

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        """The loss of a batch: its mean, or its sum over `num_items_in_batch` where Trainer accumulates gradients."""
        logits = outputs["logits"]
        if logits.shape[-1] != len(self.counts):
            raise SurgicalError(f"{len(self.counts)} counts for {logits.shape[-1]} classes: give one for each.")
        total = sum(self.counts)
        weight = torch.tensor([total / (len(self.counts) * n) for n in self.counts]).to(logits)
        losses = cross_entropy(logits, labels, weight=weight, reduction="none")
        return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
