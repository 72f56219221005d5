"""LoRA in the rest of the model, part of the same adapter: `SurgicalConfig(blocks=[-1], lora=LoraConfig(...))`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft import LoraConfig, LoraModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..blocks.unwrap import named_bare_modules
from ..errors import SurgicalError
from .config import SurgicalConfig
from .loading.saved_files import saved_tensors


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


def check_lora(model: nn.Module, config: SurgicalConfig, tuned: Iterable[str]) -> None:
    """Refuse a LoRA that would be nowhere, before anything is changed.

    Raises:
        SurgicalError: its `target_modules` match nothing outside the tuned modules.
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
