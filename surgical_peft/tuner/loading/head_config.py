"""Keeps in an adapter's config what the model's says of its head, where the base's checkpoint does not know it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...blocks.module_lists import within
from ...blocks.unwrap import named_bare_modules, unwrap_model
from ..config import SurgicalConfig
from ..tensors.tuned_tensors import TensorMap
from .saved_adapter import heads_of

_BESIDES = ("problem_type", "pad_token_id")  # by the second a decoder finds the last token, whose output it classifies


def head_config_of(model: nn.Module, config: SurgicalConfig) -> dict[str, Any] | None:
    """The arguments of `from_pretrained` that make the head of an adapter as it is here; None if the base's does.

    A head is new, and has `num_labels` here, if one of its weights, with a row for each label, is in `new_weights` or
    `modules_to_save`. Where it is not, its labels may still have other names than in the base's checkpoint.

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
    is_new = any(places[name][0].tensor.shape[:1] == (count,) for name in new)
    head: dict[str, Any] = {"num_labels": count} if is_new else {}
    names = _names_of(base.config)
    numbered = {str(label): f"LABEL_{label}" for label in range(count)}
    if names.keys() == numbered.keys() and names != numbered and (is_new or names != _saved_names(base)):
        head["id2label"] = names
    for key in _BESIDES if is_new else ():
        if (value := getattr(base.config, key, None)) is not None:
            head[key] = value
    return head or None


def _names_of(config: PreTrainedConfig) -> dict[str, str]:
    return {str(label): str(name) for label, name in (config.id2label or {}).items()}


def _saved_names(base: PreTrainedModel) -> dict[str, str]:
    """The names in the checkpoint that a model was loaded from; those of the model itself if it is not at hand."""
    try:
        return _names_of(type(base.config).from_pretrained(base.name_or_path or "", local_files_only=True))
    except (OSError, ValueError):
        return _names_of(base.config)


def apply_head_config(model: nn.Module, config: SurgicalConfig) -> None:
    """Name the labels of a model as a loaded adapter does."""
    base, head = unwrap_model(model), config.head_config or {}
    names = head.get("id2label") or {}
    if not isinstance(base, PreTrainedModel) or base.config.num_labels != head.get("num_labels", len(names)):
        return
    if names:
        name_labels(base, {label: names[str(label)] for label in range(len(names))})
    for key in _BESIDES:
        if getattr(base.config, key, None) is None and key in head:
            setattr(base.config, key, head[key])


def labels_of(model: nn.Module) -> dict[int, str] | None:
    """The names of a model's labels as its config has them now; None if it is not of transformers."""
    base = unwrap_model(model)
    return dict(base.config.id2label or {}) if isinstance(base, PreTrainedModel) else None


def name_labels(model: nn.Module, names: dict[int, str]) -> None:
    """Give the labels of a model of transformers these names."""
    config = unwrap_model(model).config
    config.id2label = dict(names)
    config.label2id = {name: label for label, name in names.items()}
