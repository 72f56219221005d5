"""Gradients of float16 weights in float32: a gradient scaler unscales no others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import SurgicalError


def keep_in_float32(weights: Iterable[Tensor]) -> None:
    """From now on the gradients of these float16 weights are float32.

    Raises:
        SurgicalError: several processes, or a torch that cannot.
    """
    for weight in weights:
        shared = dist.is_initialized() and dist.get_world_size() > 1
        if shared or not hasattr(weight, "grad_dtype"):
            who = "several processes" if shared else f"torch {torch.__version__}"
            raise SurgicalError(
                f"float16 weights are tuned here, whose gradients have to be float32, which {who} cannot keep: load "
                "the model in bfloat16 or float32."
            )
        _keepers[weight] = _keepers.get(weight, 0) + 1
        gradient, weight.grad = weight.grad, None
        weight.grad_dtype = torch.float32
        weight.grad = None if gradient is None else gradient.float()


def let_go(weights: Iterable[Tensor]) -> None:
    """The last optimizer that kept them in float32 has gone: another one would not take them."""
    for weight in weights:
        _keepers[weight] -= 1
        if not _keepers[weight]:
            weight.grad = None
            weight.grad_dtype = weight.dtype


_keepers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of a float16 weight, how many optimizers
