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
_USUAL = "single_label_classification"  # what is taken for granted where nothing is said
_OF_ADAPTER = ("id2label", "problem_type")  # that adapters of one model may have each of its own
Labels = tuple[dict[Any, str], str | None]


def head_config_of(model: nn.Module, config: SurgicalConfig) -> dict[str, Any] | None:
    """The arguments of `from_pretrained` that make the head of an adapter as it is here; None if the base's does.

    A head is new, and has `num_labels` here, if one of its weights, with a row for each label, is in `new_weights` or
    `modules_to_save`. Where it is not, its labels may still have other names than in the base's checkpoint, or be for
    another type of problem.

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
    if names.keys() == numbered.keys() and names != numbered and (is_new or names != _names_of(_saved(base))):
        head["id2label"] = names
    for key in _BESIDES if is_new else ():
        if (value := getattr(base.config, key, None)) is not None:
            head[key] = value
    problem = base.config.problem_type
    if not is_new and problem not in (None, _USUAL) and problem != _saved(base).problem_type:
        head["problem_type"] = problem  # it says what the outputs mean
    return head or None


def head_config_to_save(model: nn.Module, config: SurgicalConfig, is_active: bool) -> dict[str, Any] | None:
    """The same when an adapter is saved: a problem_type that nobody gave is set in the first forward pass.

    Names and problem of the model are those of the active adapter; another one keeps what it has.
    """
    head = head_config_of(model, config) or {}
    if not is_active:
        own = config.head_config or {}
        head = {key: value for key, value in head.items() if key not in _OF_ADAPTER}
        head |= {key: own[key] for key in _OF_ADAPTER if key in own}
    return head or config.head_config


def _names_of(config: PreTrainedConfig) -> dict[str, str]:
    return {str(label): str(name) for label, name in (config.id2label or {}).items()}


def _saved(base: PreTrainedModel) -> PreTrainedConfig:
    """The config in the checkpoint that a model was loaded from; that of the model itself if it is not at hand."""
    try:
        return type(base.config).from_pretrained(base.name_or_path or "", local_files_only=True)
    except (OSError, ValueError):
        return base.config


def apply_head_config(model: nn.Module, config: SurgicalConfig) -> None:
    """Name the labels of a model, and its type of problem, as a loaded adapter does."""
    base, head = unwrap_model(model), config.head_config or {}
    names = head.get("id2label") or {}
    if not isinstance(base, PreTrainedModel):
        return
    count = base.config.num_labels
    if count != head.get("num_labels", len(names) or count):
        return
    if names:
        name_labels(base, {label: names[str(label)] for label in range(len(names))})
    base.config.problem_type = head.get("problem_type", base.config.problem_type)
    if getattr(base.config, "pad_token_id", None) is None and "pad_token_id" in head:
        base.config.pad_token_id = head["pad_token_id"]


def labels_of(model: nn.Module) -> Labels | None:
    """The names of a model's labels and its type of problem, as they are now; None if it is not of transformers."""
    base = unwrap_model(model)
    if not isinstance(base, PreTrainedModel):
        return None
    names: dict[Any, str] = dict(base.config.id2label or {})
    return names, base.config.problem_type


def name_labels(model: nn.Module, names: dict[Any, str]) -> None:
    """Give the labels of a model of transformers these names."""
    config: Any = unwrap_model(model).config
    config.id2label = dict(names)
    config.label2id = {name: label for label, name in names.items()}


def restore_labels(model: nn.Module, labels: Labels) -> None:
    """Put back what `labels_of` told."""
    config: Any = unwrap_model(model).config
    names, config.problem_type = labels
    if names:
        name_labels(model, names)
