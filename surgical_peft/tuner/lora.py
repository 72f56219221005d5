"""LoRA in the rest of the model, part of the same adapter: `SurgicalConfig(blocks=[-1], lora=LoraConfig(...))`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, LoraModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..blocks.unwrap import bare_parameter_name, named_bare_modules, unwrap_model, unwrap_module
from ..errors import SurgicalError, first_of, reason_of
from .config import SurgicalConfig
from .loading.saved_files import Shapes, saved_tensors
from .quantization import is_packed

_CHECKED = "surgical_checked"  # the adapter's name in a skeleton


def lora_config(config: SurgicalConfig, tuned: Iterable[str]) -> LoraConfig:
    """PEFT's own config for the LoRA of `config`, which keeps out of the modules at the paths `tuned`."""
    lora = LoraConfig(**(config.lora or {}), task_type=config.task_type, inference_mode=config.inference_mode)
    kept_out = [rf"{re.escape(path)}(\..*)?" for path in tuned]
    if isinstance(lora.exclude_modules, str):
        kept_out.append(lora.exclude_modules)
    else:
        kept_out += [rf"(.*\.)?{re.escape(name)}" for name in lora.exclude_modules or []]
    lora.exclude_modules = "|".join(kept_out)
    return lora


def check_lora(model: nn.Module, config: SurgicalConfig, tuned: Iterable[str], saved: Shapes | None) -> None:
    """Refuse a LoRA that would be nowhere, or that PEFT cannot make, before anything is changed.

    Of a saved adapter its weights have to be, name by name and shape by shape, those that `config` asks for: PEFT
    loads what it finds by name, leaves the rest at random, and sees a wrong rank once the model is wrapped.

    Args:
        saved: names and shapes from the header of the saved weights; None for a new adapter.

    Raises:
        SurgicalError: its `target_modules` match nothing outside the tuned modules, or modules that LoRA does not
            take; or saved weights are missing, too many, or of another shape.
    """
    lora = lora_config(config, tuned)
    by_kind = lora.target_modules is None or lora.target_modules == "all-linear"  # which PEFT looks up by itself
    if not by_kind and not any(
        check_target_module_exists(lora, path) for path, _ in named_bare_modules(model) if path
    ):
        raise SurgicalError(
            f"lora: target_modules={config.lora['target_modules'] if config.lora else None!r} match no module outside "
            f"the ones that are tuned in full ({', '.join(list(tuned)[:6])}): leave lora out, or name others."
        )
    if saved is None and any(is_packed(parameter) for parameter in model.parameters()):
        return  # a skeleton of quantized layers is none that PEFT knows
    expected = _planned(model, lora)
    if saved is not None:
        _check_saved(model, config, lora, expected, {key: s for key, s in saved.items() if ".lora_" in key})


def _planned(model: nn.Module, lora: LoraConfig) -> Shapes:
    """Names and shapes of the weights that PEFT will make, but DoRA's magnitudes."""
    plan = copy.copy(lora)
    plan.use_dora = False
    plan.init_lora_weights = False  # as DoRA, other ways to begin read the weights, and a skeleton has none
    skeleton = _skeleton(unwrap_module(model))
    try:
        LoraModel(skeleton, {_CHECKED: plan}, _CHECKED)
    except Exception as error:  # whatever PEFT runs into
        raise SurgicalError(
            f"PEFT cannot make this LoRA in {type(unwrap_model(model)).__name__}: {reason_of(error)} Name other "
            "modules in its target_modules, or leave lora out."
        ) from error
    shapes = {key: tuple(value.shape) for key, value in skeleton.state_dict().items() if f".{_CHECKED}" in key}
    return {bare_parameter_name(key.replace(f".{_CHECKED}", "")): shape for key, shape in shapes.items()}


def _check_saved(model: nn.Module, config: SurgicalConfig, lora: LoraConfig, expected: Shapes, given: Shapes) -> None:
    if lora.use_dora:  # one a module, and of the length that the module has
        paths = {key.partition(".lora_")[0] for key in expected}
        magnitudes = {f"{path}.lora_magnitude_vector.weight" for path in paths}
        expected |= {key: given.get(key, ()) for key in magnitudes}
    where = config.read_from and config.read_from.path.parent
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unknown:
        raise SurgicalError(
            f"the LoRA of the adapter in {where} is not that of its config: it lacks {len(missing)} of "
            f"{len(expected)} weights ({first_of(missing) or 'none'}) and has {len(unknown)} others "
            f"({first_of(unknown) or 'none'}). It is damaged, or of another base model: save or fetch it again."
        )
    for key, shape in expected.items():
        if given[key] != shape:
            raise SurgicalError(
                f"the LoRA of the adapter in {where} does not fit: {key} has shape {given[key]} there, and its config "
                f"and {type(unwrap_model(model)).__name__} ask for {shape}. Nothing of it was loaded: save or fetch "
                "it again, or load its own base model."
            )


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the modules without their values, on the meta device."""
    empty: dict[int, Any] = {
        **{id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()},
        **{id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()},
    }
    return copy.deepcopy(model, empty)


def inject_lora(model: nn.Module, config: SurgicalConfig, tuned: Iterable[str], adapter_name: str) -> None:
    """Let PEFT put its LoRA layers into `model`, beside the modules at the paths `tuned`.

    Those of a saved adapter get their weights here: PEFT loads them once more, but transformers' own `load_adapter`
    only finds weights of one method, ours. Which adapter is active in them is left to the caller.
    """
    ours = model.__dict__.pop("peft_config", None)  # LoraModel would enter its config there, over ours
    try:
        LoraModel(model, {adapter_name: lora_config(config, tuned)}, adapter_name)
        empty = any(
            p.is_meta for name, p in model.named_parameters() if "lora_" in name and f".{adapter_name}." in name
        )
        weights = saved_tensors(config, lambda name: ".lora_" in name)
        if weights and not empty:  # empty ones are PEFT's own to load (low_cpu_mem_usage)
            set_peft_model_state_dict(model, weights, adapter_name)
    finally:
        model.__dict__.pop("peft_config", None)
        if ours is not None:
            model.peft_config = ours
