"""Freezes parameters for a while and gives back exactly those that it froze."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from .precision.master_weights import forget_moments

_masked: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of each parameter what `requires_grad` is without its mask


class Masks:
    """The parameters that a policy has frozen.

    What is frozen by hand is left alone. What PEFT sets while a mask is on, as where it switches adapters between a
    forward and a backward pass, holds from when it is lifted. A single parameter that is frozen by hand while it is
    masked cannot be told from the others, and is trained again: lift the masks first. Where everything is frozen by
    hand, it stays so.

    Args:
        state_policy: what a mask does to the optimizer's state, see `Policy`.

    Example:
        >>> masks = Masks("keep")
        >>> masks.set(optimizer, model.classifier.weight, trained=False)
        >>> masks.lift(model.parameters())
    """

    def __init__(self, state_policy: str) -> None:
        self._state_policy = state_policy
        self._own: dict[int, nn.Parameter] = {}

    def set(self, optimizer: Optimizer, parameter: nn.Parameter, trained: bool) -> None:
        """Freeze a parameter, or train it again if it was frozen here."""
        if not trained:
            if parameter.requires_grad:
                self._own[id(parameter)] = parameter
                _masked[parameter] = True
                parameter.requires_grad_(False)
            parameter.grad = None
            if self._state_policy == "reset":
                forget_moments(optimizer, [parameter])
        elif self._own.pop(id(parameter), None) is not None and _masked.pop(parameter, False):
            parameter.requires_grad_(True)
        if self._state_policy == "offload" and parameter in optimizer.state:
            _move(optimizer.state[parameter], parameter.device if trained else "cpu")

    def lift(self, among: Iterable[nn.Parameter]) -> None:
        """Train again what is frozen here, unless all else `among` what the policy deals with was frozen meanwhile."""
        others = [parameter for parameter in among if id(parameter) not in self._own]
        by_hand = bool(others) and not any(parameter.requires_grad for parameter in others)
        for parameter in self._own.values():
            requires_grad = _masked.pop(parameter, False)
            if requires_grad and not by_hand:
                parameter.requires_grad_(True)
        self._own.clear()


def set_requires_grad(parameter: Tensor, requires_grad: bool) -> None:
    """As PEFT switches adapters: a parameter that is masked gets it when the mask is lifted."""
    if parameter in _masked:
        _masked[parameter], requires_grad = requires_grad, False
    parameter.requires_grad_(requires_grad)


def unmask(parameter: Tensor) -> None:
    """It leaves the policy's hands: lifting its mask does not train it."""
    _masked.pop(parameter, None)


def _move(state: dict[str, Any], device: Any) -> None:
    """Moments to a device; single numbers, such as Adam's count of steps, stay where the optimizer wants them."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim():
            state[key] = value.to(device)
