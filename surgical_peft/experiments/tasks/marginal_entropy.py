"""The loss of a classifier on augmented copies of images without labels: how unsure their mean prediction is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

UNLABELED = -1  # stands for the label of such an image, so that images are counted; no loss takes it for a class


def marginal_entropy(logits: Tensor) -> Tensor:
    """The entropy of the mean over copies of what is predicted for each.

    Args:
        logits: (images, copies, classes).

    Returns:
        (images,), from 0 to the logarithm of the number of classes; at least in 32 bits.

    Source: MEMO, Zhang, Levine and Finn 2021 (arXiv 2110.09506), equation 2.

    Example:
        >>> marginal_entropy(torch.zeros(1, 8, 10))
        tensor([2.3026])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logarithms = logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])
    return -(logarithms.exp() * logarithms).sum(-1)


@dataclass
class MarginalEntropy:
    """Hooks that give a classifier of images a loss on copies: the mean over the images of `marginal_entropy`.

    Called with `pixel_values` of five dimensions, (images, copies, channels, height, width), the model predicts for
    each copy, and `labels` are left out of it; with four all is as without the hooks.

    Example:
        >>> MarginalEntropy().put_on(model)
        >>> model(pixel_values=torch.rand(4, 8, 3, 32, 32)).loss.backward()
    """

    _copies: int | None = None  # of the images of the forward pass at hand

    def put_on(self, model: nn.Module) -> None:
        """Register the hooks."""
        model.register_forward_pre_hook(self._flatten, with_kwargs=True)
        model.register_forward_hook(self._add_loss, with_kwargs=True)

    def _flatten(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        pixels = kwargs.get("pixel_values")
        self._copies = pixels.shape[1] if isinstance(pixels, Tensor) and pixels.ndim == 5 else None
        if pixels is None or self._copies is None:
            return None
        others = {key: value for key, value in kwargs.items() if key != "labels"}
        return args, {**others, "pixel_values": pixels.flatten(0, 1)}

    def _add_loss(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if self._copies is None:
            return None
        entropies = marginal_entropy(output.logits.unflatten(0, (-1, self._copies)))
        count = kwargs.get("num_items_in_batch")  # images of all batches of a step, where gradients are accumulated
        loss = entropies.mean() if count is None else entropies.sum() / count
        return type(output)(**{**output, "loss": loss})
