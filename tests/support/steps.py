"""One step of a toy, and the rates at which it was made."""

from __future__ import annotations

import torch
from torch import nn

from tests.support.toys import Toy


def backward(model: nn.Module, toy: Toy, seed: int = 0) -> None:
    model.zero_grad()
    model(**toy.batch(seed)).loss.backward()


def used_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rates at which the next step is made."""
    found: dict[str, float] = {}
    hook = optimizer.register_step_pre_hook(
        lambda o, a, k: found.update((g["block"], g["lr"]) for g in o.param_groups)
    )
    optimizer.step()
    hook.remove()
    return found
