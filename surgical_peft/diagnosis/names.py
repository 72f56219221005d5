"""The names of a model's tensors: in its checkpoint, tied to others, and as an inference engine gets them."""

from __future__ import annotations

import re
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..blocks.unwrap import bare_parameter_name, idle_parameters, unwrap_model, unwrap_module
from ..tuner.tensors.architecture import built_anew


def parameters_in_use(model: nn.Module) -> dict[str, tuple[str, nn.Parameter]]:
    """By its first name each parameter that stands in the model, with its bare name; parked and idle ones left out."""
    idle = idle_parameters(model)
    return {
        name: (bare_parameter_name(name), parameter)
        for name, parameter in model.named_parameters()
        if id(parameter) not in idle
    }


def other_names(model: nn.Module) -> dict[int, list[str]]:
    """By `id` of a parameter all its bare names."""
    names: dict[int, dict[str, None]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), {})[bare_parameter_name(name)] = None
    return {at: list(known) for at, known in names.items()}


def untied_names(model: nn.Module) -> list[str]:
    """The names that transformers ties to another, and that stand for a tensor of their own."""
    bare: Any = unwrap_model(model)
    pairs = getattr(bare, "all_tied_weights_keys", None) or {}
    return [name for name, source in pairs.items() if _tensor(bare, name) is not _tensor(bare, source)]


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    module: Any = model
    *path, last = name.split(".")
    for part in path:
        module = unwrap_module(module)._modules.get(part)
        if module is None:
            return None
    return getattr(unwrap_module(module), last, None)


def engine_names(model: nn.Module) -> dict[str, str]:
    """For each parameter by its own name how an inference engine gets it: by its `"own"` name, `"merged"` or `"not"`.

    As TRL's trainers send weights to vLLM: adapters are merged, and what then stands under a name of the base model
    arrives. Of a model that its config does not suffice to build, every name is its own.

    Source: TRL 1.16, `VLLMGeneration.sync_weights` in trl/generation/vllm_generation.py.
    """
    known = _names_of_class(unwrap_model(model))
    prefix = getattr(model, "prefix", None) if isinstance(model, PeftModel) else None
    names = {}
    for name in [name for name, _ in model.named_parameters()]:
        sent = re.sub(r"^(?:module\.|_orig_mod\.)*(?:base_model\.model\.)?", "", name)
        sent = re.sub(r"\.base_layer|modules_to_save\.default\.|_checkpoint_wrapped_module\.", "", sent)
        if ".lora_" in sent or (prefix and prefix in sent):
            names[name] = "merged"
        elif known is None or sent in known:
            names[name] = "own"
        else:
            names[name] = "not"
    return names


def _names_of_class(model: nn.Module) -> set[str] | None:
    """The names that the model's class gives its weights; None of a class that its config does not suffice for."""
    new = built_anew(model) if isinstance(model, PreTrainedModel) else None
    return None if new is None else {name for name, _ in new.named_parameters(remove_duplicate=False)}
