"""Gradients of float16 weights in float32: a gradient scaler unscales no others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import SurgicalError


def keep_in_float32(weights: Iterable[Tensor]) -> None:
    """From now on the gradients of these float16 weights are float32, and no optimizer without masters steps on them.

    Raises:
        SurgicalError: several processes, or a torch that cannot.
    """
    global _watching
    for weight in weights:
        _watching = _watching or register_optimizer_step_pre_hook(_refuse)
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
            del _keepers[weight]
            weight.grad = None
            weight.grad_dtype = weight.dtype


def _refuse(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _keepers or hasattr(optimizer, "master_weights"):
        return
    if any(weight in _keepers for group in optimizer.param_groups for weight in group["params"]):
        raise SurgicalError(
            f"{type(optimizer).__name__} steps on float16 weights whose gradients are float32, for an optimizer by "
            "create_surgical_optimizer that keeps masters of them and still lives: step with that one, or delete it "
            "first (or make it with master_weights=False)."
        )


_keepers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of a float16 weight, how many optimizers
_watching: Any = None
