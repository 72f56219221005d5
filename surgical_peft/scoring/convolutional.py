"""A word before blocks of a convolutional network are chosen, where choosing is known to be bad."""

from __future__ import annotations

import warnings

from torch import nn

from ..blocks.block_map import BlockMap
from ..blocks.unwrap import named_bare_modules, unwrap_model


def warn_of_convolutions(model: nn.Module, blocks: BlockMap) -> None:
    """Say what the choice was worth where it is known to be a bad one, see docs/paper.md."""
    modules = dict(named_bare_modules(unwrap_model(model)))
    layers = [modules[path] for name in blocks.layers for path in blocks.modules[name] if path in modules]
    if any(isinstance(module, nn.Conv2d | nn.Conv3d) for layer in layers for module in layer.modules()):
        warnings.warn(
            f'blocks="auto" is made for transformers, and {blocks.model_name} is a convolutional network: on a '
            "ResNet-26 its choice was the best one where labels changed, but under 14 corruptions it was 1.9 points "
            "behind full fine-tuning, and the first stage 0.2. Compare a few choices on validation data (surgical-peft"
            " compare, with full, first and auto_rgn), or name the blocks.",
            stacklevel=4,
        )
