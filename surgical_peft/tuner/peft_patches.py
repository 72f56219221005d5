"""Patches of PEFT: functions that would be silently wrong on a model of ours.

Each is replaced by one that asks whether the model is ours, and calls PEFT's own otherwise.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import peft.functional
import peft.tuners.tuners_utils
import peft.utils.other
import peft.utils.save_and_load
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..blocks.unwrap import PARKED
from ..errors import SurgicalError
from ..masks import set_requires_grad
from .layer import SurgicalLayer
from .model import SurgicalModel
from .quantization import unpack_idle
from .tensors.slots import BASE


def patch_peft() -> None:
    """Replace the functions, wherever they are imported under their names; a second call changes nothing."""
    _replace(peft.utils.save_and_load.get_base_model_state_dict, _get_base)
    _replace(peft.utils.save_and_load.set_base_model_state_dict, _set_base)
    _replace(peft.utils.save_and_load._get_adapter_state_dict_key_prefixes, _only_of_the_base)
    _replace(peft.utils.other._set_trainable, _set_trainable)
    _replace(peft.tuners.tuners_utils.delete_adapter, _delete_adapter)
    _replace(peft.utils.other._set_layer_requires_grad, _set_layer_requires_grad)


def _replace(current: Callable[..., Any], ours: Callable[..., Any]) -> None:
    original = getattr(current, "_surgical_original", current)

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    replaced._surgical_original = original  # type: ignore[attr-defined]
    name = original.__name__
    for module in list(sys.modules.values()):  # also in those of whoever imported it before us
        if getattr(module, "__dict__", {}).get(name) is current:
            setattr(module, name, replaced)


def _get_base(original: Callable[..., Any], model: PeftModel) -> dict[str, Tensor]:
    if not isinstance(model.base_model, SurgicalModel):
        return original(model)
    with model.base_model.base_standing():
        return {key: value for key, value in original(model).items() if f".{PARKED}." not in f".{key}"}


def _set_base(
    original: Callable[..., Any], model: PeftModel, state_dict: dict[str, Tensor], strict: bool = True
) -> Any:
    if not isinstance(model.base_model, SurgicalModel):
        return original(model, state_dict, strict)
    with model.base_model.base_standing():
        state = model.base_model.model.state_dict()
        parked = {key: value for key, value in state.items() if f".{PARKED}." in f".{key}"}
        return original(model, {**state_dict, **parked}, strict)


def _only_of_the_base(original: Callable[..., Any], model: PeftModel) -> set[str]:
    """Both functions call it, also where they were imported under another name before they were replaced."""
    tuner = model.base_model
    if isinstance(tuner, SurgicalModel):
        tuner.check_base_kept()
        if any(slot.standing != BASE for layer in tuner.layers() for slot in layer.slots.values()):
            raise SurgicalError(
                "the weights that stand in the model are an adapter's: call it inside `with model.disable_adapter()`, "
                "or import it from peft after surgical_peft, which sees to that."
            )
    return original(model)


def _set_trainable(
    original: Callable[..., Any],
    model: nn.Module,
    adapter_name: str,
    module_names: list[str] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    # For some tasks PEFT adds the names of heads after injection, when we may tune them already
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, SurgicalModel):
        tuned = tuner.peft_config[adapter_name].tuned_modules or {}
        module_names = [name for name in module_names or [] if not any(path.endswith(name) for path in tuned)]
    original(model, adapter_name, module_names, *args, **kwargs)


def _set_layer_requires_grad(original: Callable[..., Any], layer: nn.Module | Tensor, requires_grad: bool) -> None:
    original(layer, requires_grad)  # which thaws LoRA and heads each time that PEFT enables or switches adapters
    for parameter in [layer] if isinstance(layer, Tensor) else layer.parameters():
        set_requires_grad(parameter, parameter.requires_grad)  # masks stay on


def _delete_adapter(
    original: Callable[..., Any], model: nn.Module, adapter_name: str, prefix: str, layer_cls: Any = BaseTunerLayer
) -> list[str] | None:
    # It passes over modules with the prefix in their names, as all of ours have
    left: list[str] | None = None
    for layer in [module for module in model.modules() if isinstance(module, SurgicalLayer)]:
        layer.delete_adapter(adapter_name)
        left = layer.active_adapters[:] if left is None else left
    unpack_idle(model)
    found = original(model, adapter_name, prefix, layer_cls)
    return left if found is None else found
