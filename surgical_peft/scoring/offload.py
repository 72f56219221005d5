"""Weights that accelerate keeps elsewhere (CPU, disk) and lends to the device for a module's forward pass only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from accelerate.utils import retie_parameters
from torch import Tensor, nn

from ..blocks.unwrap import bare_parameter_name, unwrap_model

Arrival = Callable[[str, nn.Parameter], None]


@dataclass(frozen=True)
class Lent:
    """A weight that is lent to a module: `own` is its name there, `name` the same in the bare model.

    `path` is the name of the weight that it is: another one if it is tied to an earlier one.
    """

    path: str
    name: str
    own: str
    module: nn.Module
    hook: AlignDevicesHook

    def stored(self) -> Tensor:
        """The weight where accelerate keeps it."""
        return self.hook.weights_map[self.own]

    def loaded(self) -> nn.Parameter:
        """A copy of the weight on the device that it is lent to."""
        return nn.Parameter(self.stored().detach().to(self.hook.execution_device), requires_grad=False)


def lent_weights(model: nn.Module) -> list[Lent]:
    """Every offloaded weight of `model` in every module that uses it; tied ones share their path."""
    found = []
    first: dict[Any, str] = {}
    ties = _ties(model)
    for prefix, module in model.named_modules():
        hook = _offloading_hook(module)
        if hook is None:
            continue
        for own, _ in module.named_parameters(recurse=hook.place_submodules):
            name = bare_parameter_name(f"{prefix}.{own}" if prefix else own)
            path = ties.get(name, name)
            if isinstance(getattr(hook.weights_map, "dataset", hook.weights_map), dict):  # in memory
                value = hook.weights_map[own]
                path = first.setdefault((value.data_ptr(), value.shape), path) if value.numel() else path
            found.append(Lent(path, name, own, module, hook))
    return found


def _ties(model: nn.Module) -> Mapping[str, str]:
    """What transformers knows of tied weights: the name of the first for each of the others."""
    return getattr(unwrap_model(model), "all_tied_weights_keys", None) or {}


def _offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((each for each in hooks if isinstance(each, AlignDevicesHook) and each.offload), None)


@contextmanager
def arrivals(lent: list[Lent], arrived: Arrival) -> Iterator[None]:
    """Inside, `arrived(path, weight)` is told of each weight on loan, at each loan as another tensor."""
    names: dict[nn.Module, list[Lent]] = {}
    for each in lent:
        names.setdefault(each.module, []).append(each)
    before = [(module, module._hf_hook) for module in names]
    for module, hook in before:
        module._hf_hook = SequentialHook(hook, _Arrivals(names[module], arrived))
    try:
        yield
    finally:
        for module, hook in before:
            module._hf_hook = hook


class _Arrivals(ModelHook):
    """Comes after accelerate's own hook of an offloaded module, when its weights are on the device."""

    def __init__(self, lent: list[Lent], arrived: Arrival) -> None:
        self.lent, self.arrived = lent, arrived

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for each in self.lent:
            self.arrived(each.path, module.get_parameter(each.own))
        return args, kwargs


@contextmanager
def stand_ins_kept(model: nn.Module, lent: list[Lent]) -> Iterator[None]:
    """Afterwards the same tensors as before stand in for lent weights; accelerate makes new ones at each loan."""
    holders = {each.module.get_submodule(each.own.rpartition(".")[0]) for each in lent}
    before = [(holder, name, weight) for holder in holders for name, weight in holder._parameters.items()]
    tied: dict[str, list[str]] = {}
    for name, source in _ties(model).items() if lent else ():
        tied.setdefault(source, [source]).append(name)
    retie_parameters(
        unwrap_model(model), list(tied.values())
    )  # to one of them that is in place; a forward pass undoes that
    try:
        yield
    finally:
        for holder, name, weight in before:
            holder._parameters[name] = weight
