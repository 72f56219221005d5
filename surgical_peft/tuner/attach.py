"""Puts a `SurgicalLayer` into each module that owns tensors to tune."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..blocks.module_lists import join
from ..blocks.unwrap import PARKED, named_bare_modules
from ..errors import first_of
from ..masks import unmask
from .class_code import names_in_code
from .config import SurgicalConfig
from .layer import SurgicalLayer
from .quantization import FloatLinear, is_packed, packed_layers
from .tensors.architecture import fixed_by_architecture
from .tensors.tuned_tensors import Targets, TensorMap


@dataclass(frozen=True)
class AdapterPlan:
    """The tensors that a new adapter will have in a model; nothing is changed yet.

    Attributes:
        targets: paths of the largest modules that it tunes, and the parameters in them (None for all).
        trained: for each tensor of the adapter, by the first of its names, whether it is trained.
        packed: paths of the quantized layers that become float for it, and the dtype that they get.
    """

    targets: Targets
    trained: Mapping[str, bool]
    packed: Mapping[str, torch.dtype]


def plan_adapter(model: nn.Module, config: SurgicalConfig, targets: Targets) -> AdapterPlan:
    """Plan the tensors of an adapter for the modules at the paths `targets`, and which of them train.

    A parameter trains unless the architecture fixes it. What happens to be frozen, by a merge or by hand, trains: the
    config asks for it.

    Warns:
        UserWarning: some of the chosen parameters are frozen, and why cannot be told, since the model cannot be built
            anew.

    Raises:
        SurgicalError: quantized weights that cannot be made float, and integers.
    """
    tensors = TensorMap.find(model)
    chosen = tensors.chosen(targets)
    packed = packed_layers(model, targets, chosen)
    fixed, unknown = fixed_by_architecture(model, [name for name, asked in chosen.items() if asked])
    if unknown:
        warnings.warn(
            f"{first_of(unknown)}: frozen now, while other weights of the model are not, and trained from here on, "
            "as the choice of blocks asks. If they are not meant to train (fixed positions, for one), leave them out "
            "with target_modules or exclude_modules, or freeze them again after wrapping.",
            stacklevel=2,
        )
    return AdapterPlan(targets, {name: asked and name not in fixed for name, asked in chosen.items()}, packed)


def attach(model: nn.Module, plan: AdapterPlan, config: SurgicalConfig, adapter: str, like: str, empty: bool) -> None:
    """Give `adapter` the tensors of the plan, with the values of the set `like`; none stands yet.

    Args:
        empty: leave out the values, which are loaded next.
    """
    for path, dtype in plan.packed.items():
        packed = model.get_submodule(path)
        assert isinstance(packed, nn.Linear)
        made = FloatLinear(packed, dtype)
        model.set_submodule(path, made.plain() if config.keep_base == "none" else made)
        if config.keep_base == "cpu":
            packed.to("cpu")
    tensors = TensorMap.find(model)
    modules = dict(named_bare_modules(model))
    for path, names in _by_owner(plan, modules).items():
        owner = modules[path]
        layer = owner._modules.get(PARKED)
        if not isinstance(layer, SurgicalLayer):
            layer = SurgicalLayer(owner, config.keep_base, model).train(owner.training)
            owner.add_module(PARKED, layer)
        layer.loading = config.read_from is not None
        layer.add(
            adapter,
            {attribute: tensors.at(name) for attribute, name in names.items()},
            {attribute for attribute, name in names.items() if plan.trained[name]},
            like,
            empty,
            owner.values() if isinstance(owner, FloatLinear) else None,
        )


def _by_owner(plan: AdapterPlan, modules: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
    """The plan's tensors for each module that gets a layer, by path: their names, by those within the module.

    That is the module which owns them; of one that goes through its children (`nn.ModuleList`, torch's
    parametrizations, a `forward` over `self.children()`) the one around it: a further child would not go unnoticed.
    """
    owners: dict[str, dict[str, str]] = {}
    for name in plan.trained:
        path = name.rpartition(".")[0]
        while path and _goes_through_children(modules[path]):
            path = path.rpartition(".")[0]
        owners.setdefault(path, {})[name[len(path) + 1 if path else 0 :]] = name
    return owners


def _goes_through_children(module: nn.Module) -> bool:
    kind: Any = type(module)
    through = {"children", "named_children", "modules", "named_modules", "_modules"}
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) or bool(through & names_in_code(kind))


def requires_grad_by_name(model: nn.Module) -> dict[str, bool]:
    """`requires_grad` of each parameter of the bare model."""
    return {
        join(path, name): parameter.requires_grad
        for path, module in named_bare_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def restore_requires_grad(model: nn.Module, before: Mapping[str, bool]) -> None:
    """Restore the flags of `requires_grad_by_name`; packed and integer weights stay as they are."""
    for path, module in named_bare_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and not is_packed(parameter):
                unmask(parameter)
                parameter.requires_grad_(before.get(join(path, name), parameter.requires_grad))
