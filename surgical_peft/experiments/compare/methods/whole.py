"""The whole model: as it is, and tuned at one rate."""

from __future__ import annotations

from torch import nn

from ....scoring.selection import Selection
from ...recipe.recipe import Recipe
from .method import Method


def tune_everything(model: nn.Module, selection: Selection, recipe: Recipe) -> nn.Module:
    """The model with all its parameters trained, without any wrapper."""
    return model.requires_grad_(True)


def _tune_nothing(model: nn.Module, selection: Selection, recipe: Recipe) -> nn.Module:
    return model.requires_grad_(False)


def nothing() -> Method:
    """The source model as it is.

    Costs: nothing.

    Example:
        methods: [nothing, full]
    """
    return Method("no adaptation", wrap=_tune_nothing, rates=(), is_trained=False)


def full() -> Method:
    """Full fine-tuning, without any wrapper: what all others are compared with.

    Costs: nothing to choose.

    Example:
        methods: [full, head]
    """
    return Method("full fine-tuning", wrap=tune_everything)
