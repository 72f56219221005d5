"""Freezes parameters for a while and gives back exactly those that it froze."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..blocks.unwrap import idle_parameters
from ..precision.master_weights import forget_moments


class Masks:
    """The parameters of a model that a policy has frozen.

    What is frozen by hand is left alone. What PEFT has parked by the time a mask is lifted stays frozen too: PEFT sets
    `requires_grad` when it switches to that adapter.

    Args:
        model: whose parameters they are; it is not kept alive.
        state_policy: what a mask does to the optimizer's state, see `Policy`.

    Example:
        >>> masks = Masks(model, "keep")
        >>> masks.set(optimizer, model.classifier.weight, trained=False)
        >>> masks.lift()
    """

    def __init__(self, model: nn.Module, state_policy: str) -> None:
        self._model = weakref.ref(model)
        self._state_policy = state_policy
        self._frozen: dict[int, nn.Parameter] = {}

    def set(self, optimizer: Optimizer, parameter: nn.Parameter, trained: bool) -> None:
        """Freeze a parameter, or train it again if it was frozen here."""
        if not trained:
            if parameter.requires_grad:
                self._frozen[id(parameter)] = parameter
                parameter.requires_grad_(False)
            parameter.grad = None
            if self._state_policy == "reset":
                forget_moments(optimizer, [parameter])
        elif self._frozen.pop(id(parameter), None) is not None:
            parameter.requires_grad_(True)
        if self._state_policy == "offload" and parameter in optimizer.state:
            _move(optimizer.state[parameter], parameter.device if trained else "cpu")

    def lift(self) -> None:
        """Train again all that is frozen here."""
        model = self._model()
        idle = idle_parameters(model) if model is not None and self._frozen else set()
        for at, parameter in self._frozen.items():
            if at not in idle:
                parameter.requires_grad_(True)
        self._frozen.clear()


def _move(state: dict[str, Any], device: Any) -> None:
    """Moments to a device; single numbers, such as Adam's count of steps, stay where the optimizer wants them."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim():
            state[key] = value.to(device)
