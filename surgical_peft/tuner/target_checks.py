"""Checks of a choice of modules, before anything is changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled

from ..blocks.module_lists import parents
from ..blocks.unwrap import PARKED, named_bare_modules, unwrap_model
from ..errors import SurgicalError
from ..scoring.offload import lent_weights
from .config import SurgicalConfig
from .layer import SurgicalLayer
from .quantization import is_packed
from .tensors.row_names import split_row, tensor_of
from .tensors.slots import BASE
from .tensors.tuned_tensors import Place, TensorMap, put


def check_no_container(model: nn.Module) -> None:
    """Refuse a model inside a container that holds it in `module`, such as `nn.DataParallel` or DDP.

    Raises:
        SurgicalError: it is in one.
    """
    if list(model._modules) == ["module"] and unwrap_model(model) is not model:
        name = type(model).__name__
        raise SurgicalError(
            f"{name} holds the model, and an adapter goes into the model itself: wrap first, as in "
            f"{name}(get_peft_model(model.module, config))."
        )


def check_adapter_names(model: nn.Module, adapters: dict[str, SurgicalConfig], new: SurgicalConfig) -> None:
    """Refuse adapter names by which PEFT would lose weights.

    Raises:
        SurgicalError: the model is wrapped already, or, with several adapters, one has the name of a module.
    """
    name = [name for name, config in adapters.items() if config is new][-1]  # two may share one config object
    layers = [module for module in model.modules() if isinstance(module, SurgicalLayer)]
    if "." in name or name == BASE:
        raise SurgicalError(f"adapter name {name!r}: a dot, or {BASE!r}, cannot be in it. Call the adapter otherwise.")
    if isinstance(model, PeftModel) or any(name in layer.adapters for layer in layers):
        raise SurgicalError(
            f"the model is wrapped already, an adapter {name!r} would mix with the old one: model.unload() the old "
            "one first, load the model afresh, or model.add_adapter(another_name, config)."
        )
    if len(adapters) > 1:
        if any(isinstance(config, SurgicalConfig) and config.keep_base == "none" for config in adapters.values()):
            raise SurgicalError(
                f"adapter {name!r} cannot stand beside {', '.join(n for n in adapters if n != name)}: "
                "keep_base='none' trains in place, which leaves no base for a second one. Use 'device' or 'cpu'."
            )
        parts = {
            part for path, module in named_bare_modules(model) for part in [*path.split("."), *module._parameters]
        }
        for clash in [other for other in adapters if other in parts]:
            raise SurgicalError(
                f"adapter name {clash!r} is also the name of a module or weight: PEFT saves one of several adapters "
                "by leaving out all weights with another's name in their path. Call the adapter something else."
            )


def check_separate(model: nn.Module, paths: list[str], kind: type[nn.Module] = SurgicalLayer) -> None:
    """Refuse paths that hold, lie in, or (unless `kind` is the wrapper of both) are what another adapter wraps."""
    wanted, holders = set(paths), {parent: path for path in paths for parent in parents(path)}
    for other, wrapper in model.named_modules():
        if not isinstance(wrapper, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        if isinstance(wrapper, SurgicalLayer):
            if kind is SurgicalLayer:  # sets of tensors stand side by side
                continue
            other = other.rpartition(".")[0]
        inside = [parent for parent in parents(other) if parent in wanted]
        around = [holders[other]] if other in holders else []
        itself = [other] if other in wanted and not isinstance(wrapper, kind) else []
        for path in [*itself, *inside, *around]:
            raise SurgicalError(
                f"{path} cannot be tuned: another adapter already tunes {other} with a {type(wrapper).__name__}. "
                "Adapters of other methods, and new heads in modules_to_save, can only be beside it."
            )


def check_exchangeable(model: nn.Module, tensors: TensorMap, chosen: Iterable[str], config: SurgicalConfig) -> None:
    """Try on the chosen tensors, one by one, what switching adapters does; nothing changes.

    Raises:
        SurgicalError: their memory is another weight's too, or their module does not let them be set.
    """
    tensors.check_alone(chosen)
    layers = [module for module in model.modules() if isinstance(module, SurgicalLayer)]
    chosen = list(chosen)
    _check_rows(tensors, chosen, layers)
    kept = {place: layer.keep_base for layer in layers for slot in layer.slots.values() for place in slot.places}
    for name in chosen:
        for place in tensors.at(name):
            module, kind = place.module, type(place.module).__name__
            if split_row(name) is None:
                _check_settable(name, place)
            if kept.get((module, place.attribute), config.keep_base) != config.keep_base:
                raise SurgicalError(
                    f"keep_base={config.keep_base!r}: {name} is tuned by another adapter already, with "
                    f"keep_base={kept[module, place.attribute]!r}. Adapters that share a module share its base: say "
                    "the same."
                )
            if PARKED in module._modules and not isinstance(module._modules[PARKED], SurgicalLayer):
                raise SurgicalError(f"{kind} has a part named {PARKED!r} itself, which we need: rename it.")


def _check_settable(name: str, place: Place) -> None:
    tensor, kind = place.tensor, type(place.module).__name__
    try:
        put(place.module, place.attribute, tensor)
    except Exception as error:  # whatever the class raises
        raise SurgicalError(
            f"{name} cannot be tuned: {kind} does not let its {place.attribute} be set ({error}). Choose other "
            "modules."
        ) from error
    if getattr(place.module, place.attribute) is not tensor:
        raise SurgicalError(
            f"{name} cannot be tuned: {kind} gives something else for its {place.attribute} than what stands there. "
            "Choose other modules."
        )


def _check_rows(tensors: TensorMap, chosen: Collection[str], layers: Iterable[SurgicalLayer]) -> None:
    """Refuse single experts of weights that are packed, shared out or read elsewhere, or that are tuned whole, too."""
    rows = {name: tensors.at(name) for name in chosen if split_row(name)}
    tuned = {place for layer in layers for slot in layer.slots.values() for place in slot.places}
    by_row = {(module, tensor_of(name)) for module, name in tuned if split_row(name)}
    whole = {(place.module, place.attribute) for name in chosen if name not in rows for place in tensors.at(name)}
    for name, places in rows.items():
        module, attribute = places[0].module, tensor_of(places[0].attribute)
        weight: Any = module._parameters[attribute]
        if is_packed(weight) or type(weight) is not nn.Parameter or not weight.is_floating_point():
            fault = f"{attribute} is a {type(weight).__name__} of {weight.dtype}, packed or shared out over processes"
        elif len(places) > 1:
            fault = f"{attribute} stands in {len(places)} places"
        elif hasattr(type(module), attribute):
            fault = f"{type(module).__name__} makes its {attribute} from other weights"
        elif is_deepspeed_zero3_enabled() or is_fsdp_enabled():
            fault = "FSDP and DeepSpeed's ZeRO-3 share the stacked weight out over processes"
        elif (module, attribute) in tuned:
            fault = f"another adapter tunes {attribute} whole"
        else:
            continue
        raise SurgicalError(f"{name} cannot be tuned apart from the other experts: {fault}. Take 'experts' whole.")
    if both := [(module, attribute) for module, attribute in whole if (module, attribute) in by_row]:
        raise SurgicalError(
            f"{both[0][1]} of {type(both[0][0]).__name__} cannot be tuned whole: another adapter tunes single experts "
            "of it. Choose experts one by one, experts[0:4], or unload the other adapter."
        )


def check_at_hand(model: nn.Module, names: list[str]) -> None:
    """Refuse weights that accelerate keeps elsewhere."""
    for weight in lent_weights(model):
        if weight.name in names or weight.path in names or weight.name in map(tensor_of, names):
            raise SurgicalError(
                f"{weight.name} is offloaded by accelerate, so there is no weight to train in its place: load the "
                "model with a device_map that keeps the chosen blocks on a device (the others may be offloaded), or "
                "wrap it before cpu_offload."
            )
