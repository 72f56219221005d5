"""Eval mode for frozen modules while the rest trains: no dropout, no new batch statistics (`frozen_eval`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from .class_code import names_in_code


def eval_frozen(model: nn.Module, tuned: Iterable[nn.Module]) -> None:
    """Put frozen modules that behave otherwise in training into eval mode.

    That is every module whose class reads `self.training`: dropout, batch normalization, stochastic depth, attention
    that drops out by itself. All others stay in train mode; so do embeddings, on which NEFTune's hook looks for it.

    Args:
        model: in train mode.
        tuned: modules that are tuned as a whole: all that is in them trains, their dropout too.
    """
    _eval_frozen(model, set(tuned))


def _eval_frozen(module: nn.Module, tuned: set[nn.Module]) -> bool:
    """Return True if `module` holds a tuned one."""
    if module in tuned:
        return True
    if isinstance(module, AuxiliaryTrainingWrapper | LoraLayer):  # LoRA's dropout has no weights, and is part of it
        trains = any(parameter.requires_grad for parameter in module.parameters())
        if not trains:
            module.eval()
        return trains
    below = [_eval_frozen(child, tuned) for child in module._modules.values() if child is not None]
    direct = (parameter.requires_grad for parameter in module._parameters.values() if parameter is not None)
    if any(below) or any(direct):
        return True
    if module.training and not isinstance(module, nn.Embedding) and reads_training(module):
        module.training = False
    return False


def reads_training(module: nn.Module) -> bool:
    """True if a method of its class reads `training`, a function of the class's module that one of them names, or
    the hook of `torch.nn.utils.spectral_norm`.

    Example:
        >>> reads_training(nn.Dropout()), reads_training(nn.Linear(2, 2))
        (True, False)
    """
    kind: Any = type(module)
    hooks = module._forward_pre_hooks.values()
    return "training" in names_in_code(kind) or any(isinstance(hook, SpectralNorm) for hook in hooks)
