"""Tells parameters that an architecture never trains, such as sinusoidal positions, from those frozen by chance."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ...blocks.module_lists import inside, join
from ...blocks.unwrap import named_bare_modules


def fixed_by_architecture(model: nn.Module, names: Collection[str]) -> tuple[set[str], list[str]]:
    """The parameters among `names` that the model's class, built anew from its config, freezes by itself.

    Each `PreTrainedModel` in `model` is built on the meta device, which takes a few hundredths of a second. What is
    frozen now, after a merge or by hand, does not count.

    Returns:
        these names; and those of which it cannot be told: frozen now, in a model that cannot be built anew, and whose
        other parameters are not.

    Example:
        >>> model = WhisperModel(WhisperConfig())
        >>> fixed_by_architecture(model, [name for name, _ in model.named_parameters()])
        ({'encoder.embed_positions.weight'}, [])
    """
    fixed: set[str] = set()
    known: list[str] = []
    for path, module in outermost_models(model).items():
        if (built := built_anew(module)) is not None:
            known.append(path)
            fixed |= {join(path, name) for name, weight in built.named_parameters() if not weight.requires_grad}
    weights = {
        join(path, name): p
        for path, module in named_bare_modules(model)
        for name, p in module._parameters.items()
        if p is not None
    }
    if not any(weight.requires_grad for weight in weights.values()):
        return fixed.intersection(names), []  # frozen as a whole: by a merge, or by hand
    frozen = [name for name in names if name in weights and not weights[name].requires_grad]
    return fixed.intersection(names), [name for name in frozen if not any(inside(name, path) for path in known)]


def outermost_models(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The models of transformers in `model`, by path, without those that lie in another one."""
    models: dict[str, PreTrainedModel] = {}
    for path, module in named_bare_modules(model):
        if isinstance(module, PreTrainedModel) and not any(inside(path, other) for other in models):
            models[path] = module
    return models


def built_anew(model: PreTrainedModel) -> nn.Module | None:
    """A model of the same class and config, without weights; None if the config does not suffice to build it."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # others ask for packages or devices that names do not need
    try:
        with torch.device("meta"), no_init_weights():
            return type(model)(config)
    except Exception:  # a class may want more than its config, and raise whatever it likes
        return None
