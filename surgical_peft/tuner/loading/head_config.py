"""Keeps in an adapter's config what the model's says of a new head, since the base's checkpoint does not know it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...blocks.module_lists import within
from ...blocks.unwrap import named_bare_modules, unwrap_model
from ..config import SurgicalConfig
from ..tensors.tuned_tensors import TensorMap
from .saved_adapter import heads_of

_BESIDES = ("problem_type", "pad_token_id")  # by the second a decoder finds the last token, whose output it classifies


def head_config_of(model: nn.Module, config: SurgicalConfig) -> dict[str, Any] | None:
    """The arguments of `from_pretrained` that make the new head of an adapter; None if it has none.

    A head is new if one of its weights, with a row for each label, is in `new_weights` or `modules_to_save`.

    Example:
        >>> head_config_of(model, model.peft_config["default"])
        {'num_labels': 2, 'id2label': {'0': 'ham', '1': 'spam'}}
    """
    base = unwrap_model(model)
    if not isinstance(base, PreTrainedModel) or not (count := base.config.num_labels):
        return None
    heads = heads_of(config, (path for path, _ in named_bare_modules(base)))
    places = TensorMap.find(base).places
    new = [name for name in places if name in (config.new_weights or ()) or within(name, heads)]
    if not any(places[name][0].tensor.shape[:1] == (count,) for name in new):
        return None
    names = {str(label): str(name) for label, name in (base.config.id2label or {}).items()}
    found: dict[str, Any] = {"num_labels": count}
    if names != {str(label): f"LABEL_{label}" for label in range(count)}:
        found["id2label"] = names
    for key in _BESIDES:
        if (value := getattr(base.config, key, None)) is not None:
            found[key] = value
    return found


def apply_head_config(model: nn.Module, config: SurgicalConfig) -> None:
    """Name the labels of a model as a loaded adapter's new head does."""
    base, head = unwrap_model(model), config.head_config or {}
    if isinstance(base, PreTrainedModel) and base.config.num_labels == head.get("num_labels"):
        if names := head.get("id2label"):
            base.config.id2label = {int(label): name for label, name in names.items()}
            base.config.label2id = {name: int(label) for label, name in names.items()}
        for key in _BESIDES:
            if getattr(base.config, key, None) is None and key in head:
                setattr(base.config, key, head[key])
