"""The stock PEFT config of an adapter: `LoraConfig(modules_to_save=[...])`, and its traps."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from ..blocks.module_lists import within
from ..errors import SurgicalError
from ..tuner.config import SurgicalConfig
from ..tuner.loading.saved_adapter import SavedAdapter, heads_of
from ..tuner.tensors.tuned_tensors import TensorMap

_ELSE = "Keep the adapter as it is, or export it with --format merged or delta."


def stock_config(config: SurgicalConfig, whole: Iterable[str], lora: dict[str, Any] | None = None) -> LoraConfig:
    """The config by which PEFT alone loads `whole` modules, and LoRA beside them: as `lora` says, or the config."""
    lora = config.lora if lora is None else lora
    return LoraConfig(
        **({"target_modules": DUMMY_TARGET_MODULES} if lora is None else lora),
        modules_to_save=sorted({*whole, *(config.modules_to_save or [])}) or None,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        auto_mapping=config.auto_mapping,
        inference_mode=True,
    )


def whole_modules(adapter: SavedAdapter, model: nn.Module | None) -> list[str]:
    """Paths of the modules that the adapter's file holds whole; checked against the base `model` if it is at hand.

    Raises:
        SurgicalError: the file holds a module in parts, or PEFT would find other modules by these paths.
    """
    modules = dict(model.named_modules()) if model is not None else {}
    paths: list[str] = []
    for path, tuned in (adapter.config.tuned_modules or {}).items():
        if tuned is not None and not modules:
            raise SurgicalError(
                f"the adapter tunes only parts of {path}; whether stock PEFT can hold them depends on the base model: "
                f"give it as base_model=model. {_ELSE}"
            )
        if tuned == [] or not path:
            part = (
                f"statistics of {path}, which move with frozen_eval=False" if path else f"{tuned} of the model itself"
            )
            raise SurgicalError(f"the adapter tunes {part}; stock PEFT takes modules whole. {_ELSE}")
        names = [path] if tuned is None else [f"{path}.{name}".rpartition(".")[0] for name in tuned]
        paths += dict.fromkeys(names)
    if model is None:
        return paths
    check_untied(model, adapter.own)
    check_found_alone(modules, paths)
    to_save = heads_of(adapter.config, modules)
    for path in [*paths, *to_save]:
        missing = [name for name in modules[path].state_dict() if f"{path}.{name}" not in adapter.tensors]
        if missing:
            raise SurgicalError(
                f"the adapter's file holds {path} without its {missing[0]}; stock PEFT takes modules whole. {_ELSE}"
            )
    strange = [name for name in adapter.own if not within(name, [*paths, *to_save])]
    if strange:
        raise SurgicalError(f"the adapter's file holds {strange[0]}, which its config does not tune: save it again.")
    return paths


def check_untied(model: nn.Module, names: Iterable[str]) -> None:
    """Make sure that no weight stands in several modules: PEFT would change one of them and leave the others.

    Raises:
        SurgicalError: one is tied; the message names all its places.
    """
    for name, *others in TensorMap.find(model).tied(names):
        raise SurgicalError(
            f"the adapter tunes {name}, which is one weight with {', '.join(others)}: stock PEFT would change the one "
            f"and leave the other. {_ELSE}"
        )


def check_found_alone(modules: Collection[str], paths: Iterable[str]) -> None:
    """Make sure that each path finds one module: PEFT takes every module whose path ends with the given one.

    Raises:
        SurgicalError: a path is of no module, or finds another module as well.
    """
    for path in paths:
        matches = [other for other in modules if other.endswith(path)]
        if path not in matches:
            raise SurgicalError(
                f"the adapter tunes {path}, and the base model has no module of that path: give the model that the "
                "adapter was made from."
            )
        others = [other for other in matches if other != path]
        if others:
            raise SurgicalError(
                f"PEFT finds modules by the end of their path: {path} would stand for {others[0]} too, and no longer "
                f"path sets them apart. {_ELSE}"
            )
