"""Unwraps models, modules and names from DDP, FSDP, `torch.compile`, checkpointing and PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "original_module")
_ANYWHERE = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(_INNER)})(?:\.|$)")
PARKED = "surgical_"  # the child of a tuned module that holds the sets of tensors that do not stand in it
_SETS = re.compile(rf"(?:(?<=\.)|^)(?:{PARKED}|modules_to_save)\.[^.]+(?:\.|$)")  # followed by an adapter's name
_FRONT = re.compile(r"^(?:module\.|base_model\.model\.)+")


def bare_parameter_name(name: str) -> str:
    """A parameter's name in the bare model: without the parts that containers and PEFT's wrappers add.

    Example:
        >>> bare_parameter_name("module.base_model.model.vit.layers.1.modules_to_save.default.mlp.fc1.weight")
        'vit.layers.1.mlp.fc1.weight'
    """
    return _FRONT.sub("", _SETS.sub("", _ANYWHERE.sub("", name))).rstrip(".")


def is_row(name: str) -> bool:
    """True for the name of a row of a stacked weight, which an adapter shows as a parameter beside it.

    Example:
        >>> is_row("layers.1.mlp.experts.surgical_.standing.down_proj[3]")
        True
    """
    return name.endswith("]")


def unwrap_model(model: nn.Module) -> nn.Module:
    """The user's own model inside DDP, FSDP, `torch.compile` and `PeftModel`, in any order of these."""
    *_, bare = nested_models(model)
    return bare


def nested_models(model: nn.Module) -> Iterator[nn.Module]:
    """A model and PEFT's tuners and other models in it, from the outside in; the last one is the user's own."""
    yield (model := unwrap_module(model))
    if list(model._modules) == ["module"]:
        yield from nested_models(model.get_submodule("module"))
    elif "base_model" in model._modules:
        tuner = unwrap_module(model.get_submodule("base_model"))
        if "model" in tuner._modules:
            yield tuner
            yield from nested_models(tuner.get_submodule("model"))


def unwrap_module(module: nn.Module) -> nn.Module:
    """The module that a wrapper stands for, e.g. its `base_layer`; the module itself if it is none."""
    while (inner := next((module._modules[name] for name in _INNER if name in module._modules), None)) is not None:
        module = inner
    return module


def named_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `nn.Module`'s, without the `SurgicalLayer` of a tuned module."""
    return ((name, child) for name, child in module.named_children() if name != PARKED)


def named_bare_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the bare model: paths have no containers."""
    ahead = [(path, module)]
    while ahead:
        path, module = ahead.pop()
        yield path, (module := unwrap_module(module))
        children = [(f"{path}.{name}" if path else name, child) for name, child in named_children(module)]
        ahead += reversed(children)


def idle_parameters(model: nn.Module) -> set[int]:
    """`id`s of parameters that are not in use: parked sets, wrapped originals, LoRA of idle adapters."""
    idle: set[int] = set()
    for module in model.modules():
        wrapper: Any = module
        merged = module.__dict__.get("merged_adapters")  # PEFT's layers have it, perhaps empty
        for name, adapters in module._modules.items():
            if name == PARKED and adapters is not None:  # under ZeRO-3; and rows, experts[3], which are in use
                idle |= {id(parameter) for name, parameter in adapters.named_parameters() if not is_row(name)}
            if (
                merged is not None
                and name.startswith("lora_")
                and isinstance(adapters, nn.ModuleDict | nn.ParameterDict)
            ):
                in_use = [] if wrapper.disable_adapters or merged else wrapper.active_adapters
                for part in [part for adapter, part in adapters.items() if adapter not in in_use]:
                    idle |= {id(part), *(id(p) for p in (part.parameters() if isinstance(part, nn.Module) else ()))}
        copies = module._modules.get("modules_to_save")
        if isinstance(copies, nn.ModuleDict):
            active = [] if wrapper.disable_adapters else [name for name in wrapper.active_adapters if name in copies]
            used = copies[active[0]] if active else unwrap_module(module)
            ids = {id(parameter) for parameter in used.parameters()}
            idle |= {id(parameter) for parameter in module.parameters()} - ids
    return idle
