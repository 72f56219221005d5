"""Weights that the base's checkpoint does not hold: others in every process, unless the adapter holds them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.fsdp import is_fsdp_enabled

from ...blocks.module_lists import inside, within
from ...blocks.unwrap import named_bare_modules, named_children, unwrap_model, unwrap_module
from ...errors import first_of
from ...scoring.distributed import broadcast_from_first
from ..config import SurgicalConfig
from ..layer import base_tensors
from ..quantization import WAS_PACKED, FloatLinear
from ..tensors.architecture import fixed_by_architecture, outermost_models
from ..tensors.tuned_tensors import TensorMap
from .saved_adapter import heads_of

# PEFT's classes for these tasks save a classifier besides, since its weights are new.
_TASKS_WITH_NEW_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_MARK = "_is_hf_initialized"  # what from_pretrained leaves on each weight that it has read from the checkpoint


def has_new_head(config: SurgicalConfig) -> bool:
    """True if the task of `config` gives a model a new head, which is trained and saved."""
    return config.task_type in _TASKS_WITH_NEW_HEAD


def new_head(model: nn.Module, config: SurgicalConfig) -> list[str]:
    """Paths of the modules beside the body that a model shares with other tasks, if its task has a new head."""
    task_model = unwrap_model(model)
    body = getattr(task_model, "base_model_prefix", "")
    if not has_new_head(config) or body not in task_model._modules:
        return []
    return [path for path, _ in named_children(task_model) if path != body]


def newly_initialized(model: nn.Module) -> set[str]:
    """Names of the parameters that `from_pretrained` has not read from the checkpoint: missing, or of another size.

    transformers 5 marks the weights that it reads. So this also finds what was put into the model by hand since. Of a
    model without marks nothing is told: it was built from its config, or is a `deepcopy`, which drops them.

    Example:
        >>> newly_initialized(BertForSequenceClassification.from_pretrained("bert-base-uncased"))
        {'classifier.weight', 'classifier.bias'}
    """
    new: set[str] = set()
    base, places = base_tensors(model), TensorMap.find(model).places
    for path, part in outermost_models(model).items():
        weights = [name for name, (place, *_) in places.items() if inside(name, path) and place.is_parameter]
        # the base's tensor, or the object that it was read into, which the first adapter has and ZeRO-3 copies barely
        read = {n for n in weights if _MARK in base[n].__dict__ or _MARK in places[n][0].tensor.__dict__}
        fixed = re.compile("|".join(part._keys_to_ignore_on_load_missing or ()) or "(?!)")
        for name in weights if read else ():
            tensor, module = base[name], places[name][0].module
            # offloaded, quantized and sharded ones are made anew, and what was packed is float by our own doing
            plain = type(tensor) is nn.Parameter and tensor.is_floating_point() and not tensor.is_meta
            ours = isinstance(module, FloatLinear) or WAS_PACKED in module.__dict__
            if name not in read and plain and not ours and not fixed.search(name.removeprefix(f"{path}.")):
                new.add(name)
    if is_fsdp_enabled():  # where the first process alone reads the weights
        new = broadcast_from_first(new)
    return new - fixed_by_architecture(model, new)[0] if new else new


def note_new_weights(
    model: nn.Module,
    config: SurgicalConfig,
    chosen: Collection[str],
    new: set[str],
    named: Sequence[str],
    saved: Iterable[str] | None,
) -> None:
    """Say in `config` which of the adapter's weights are new, and warn of the others.

    Args:
        chosen: the tensors of the adapter.
        new: as `newly_initialized` tells.
        named: modules that are new by the word of `modules_to_save`, also where the blocks tune them anyway.
        saved: today's names in the file of a saved adapter, whose config says already what was new when it was made.

    Warns:
        UserWarning: weights are new, and not in the adapter.
    """
    ends = {name for name in _embeddings(model) if name in chosen or name in new}
    resized = ends if ends and _is_resized(model) else set()  # PEFT saves them, beside any adapter
    if saved is None:
        heads = [*new_head(model, config), *named]
        config.new_weights = sorted(n for n in chosen if n in new or n in resized or within(n, heads))
    held = {*chosen, *resized, *(saved or ())}
    to_save = heads_of(config, (path for path, _ in named_bare_modules(model)))
    rest = sorted(name for name in new if name not in held and not within(name, to_save))
    if rest:
        homes = list(dict.fromkeys(name.rpartition(".")[0] or name for name in rest))
        warnings.warn(
            f"{first_of(rest)}: not in the checkpoint that the model "
            "was loaded from, so initialized anew in every process, and neither tuned nor saved by this adapter. "
            "Where it is loaded again, its answers will be others. Give their modules to the adapter "
            f"(modules_to_save={homes[:5]}, or their block in blocks), or save the whole model once "
            "(save_pretrained) and load the base from there.",
            stacklevel=2,
        )


def embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """The input and output embeddings, by path: PEFT saves them beside any adapter when the vocabulary was resized."""
    base = unwrap_model(model)
    if not isinstance(base, PreTrainedModel):
        return {}
    try:
        ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    except NotImplementedError:  # of a model without
        return {}
    return {
        path: module
        for path, module in named_bare_modules(base)
        if any(unwrap_module(end) is module for end in ends if end)
    }


def _embeddings(model: nn.Module) -> set[str]:
    ends, first = embeddings(model), TensorMap.find(model).first
    return {first[name] for name in first if name.rpartition(".")[0] in ends}


def _is_resized(model: nn.Module) -> bool:
    """True if the vocabulary has another size than in the checkpoint, as far as that is known here."""
    base: Any = unwrap_model(model)
    try:
        before = type(base.config).from_pretrained(base.name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return False
    return getattr(before, "vocab_size", None) != getattr(base.config, "vocab_size", None)
