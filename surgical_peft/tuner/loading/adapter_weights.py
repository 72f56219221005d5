"""An adapter's tensors out of a model's state dict, and back into the model, under the base model's own names."""

from __future__ import annotations

import torch
from torch import nn

from ...blocks.module_lists import join
from ...blocks.unwrap import PARKED, bare_parameter_name, unwrap_model
from ...errors import SurgicalError
from ..config import SurgicalConfig
from ..layer import SurgicalLayer
from ..moved_buffers import warn_of_moved_buffers
from ..tensors.slots import is_dealt, is_sharded
from ..tensors.tuned_tensors import TensorMap
from .compatibility import bare_names, match
from .saved_files import Shapes


def layers_by_path(model: nn.Module) -> dict[str, SurgicalLayer]:
    """Our layers in `model` by the paths of the modules that they belong to, as `state_dict()` has them."""
    return {
        name.removeprefix("_fsdp_wrapped_module.").removesuffix(PARKED).removesuffix("."): module
        for name, module in model.named_modules()
        if isinstance(module, SurgicalLayer)
    }


def adapter_weights(
    model: nn.Module, config: SurgicalConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of `state_dict`, a model's, that an adapter saves, under the base model's own names.

    What is parked is taken out of `state_dict`: no one else is to save it.

    Raises:
        SurgicalError: a parked tensor of the adapter is dealt out over processes, and not in `state_dict`; or a tuned
            module has been replaced since.
    """
    warn_of_moved_buffers(unwrap_model(model), config)
    weights: dict[str, torch.Tensor] = {}
    for path, layer in layers_by_path(model).items():
        for attribute, tensor in layer.tensors(adapter_name).items():
            stands = layer.slots[attribute].standing == adapter_name
            name = join(path, attribute)
            value = state_dict.get(name if stands else join(path, f"{PARKED}.{adapter_name}.{attribute}"))
            if value is None and (is_sharded(tensor) or is_dealt(tensor)):
                raise SurgicalError(
                    f"adapter {adapter_name!r}: its {name} is dealt out over processes and not in the state_dict that "
                    f"was given: model.set_adapter({adapter_name!r}) first, and save again."
                )
            weights[name] = tensor.detach() if value is None else value
    names = {bare_parameter_name(name) for name in weights}
    gone = [
        name for name in TensorMap.find(unwrap_model(model)).chosen(config.tuned_modules or {}) if name not in names
    ]
    if gone:
        raise SurgicalError(
            f"adapter {adapter_name!r} is to hold {gone[0]}, but that module has been replaced by another one since, "
            "which no adapter tunes: change the model first, and wrap it then."
        )
    for key in [key for key in state_dict if f".{PARKED}." in f".{key}"]:
        del state_dict[key]
    return weights


def load_weights(
    model: nn.Module, config: SurgicalConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Load saved weights into an adapter's tensors, wherever they are; returns what else there is, such as LoRA's.

    Raises:
        SurgicalError: weights are missing, too many, or of another shape; nothing has been loaded then.
    """
    layers = layers_by_path(model)
    places: dict[str, tuple[str, str]] = {}
    shapes: Shapes = {}
    for path, layer in layers.items():
        for attribute, tensor in layer.tensors(adapter_name).items():
            name = bare_parameter_name(join(path, attribute))
            places[name] = (path, attribute)
            shapes[name] = tuple(tensor.shape)
    done = f".modules_to_save.{adapter_name}."  # PEFT has found their places already
    ours = bare_names(key for key in state_dict if done not in key)
    saved = {name: tuple(state_dict[key].shape) for name, key in ours.items()}
    # statistics of frozen modules, of which an adapter that was trained with these in eval mode has none: the base's
    still = {path for path, tuned in (config.tuned_modules or {}).items() if tuned == []}
    shapes = {name: shape for name, shape in shapes.items() if name in saved or name.rpartition(".")[0] not in still}
    names = match(model, config, saved, shapes, f"the state dict for adapter {adapter_name!r}")
    values: dict[str, dict[str, torch.Tensor]] = {}
    for key, name in names.items():
        path, attribute = places[name]
        values.setdefault(path, {})[attribute] = state_dict[ours[key]]
    for path, tensors in values.items():
        layers[path].load(adapter_name, tensors)
    first = TensorMap.find(model).first
    loaded = {ours[key] for key in ours if key in names or first.get(key) in places}
    return {key: value for key, value in state_dict.items() if key not in loaded}
