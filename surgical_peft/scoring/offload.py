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
    """A weight that is lent to a module: `own` is its name in the module, `name` its name in the bare model.

    `path` is the name under which it counts: that of an earlier weight which it is tied to, else `name`.
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
    lent = []
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
            lent.append(Lent(path, name, own, module, hook))
    return lent


def _ties(model: nn.Module) -> Mapping[str, str]:
    """The tied weights as transformers records them: for each later name the first."""
    return getattr(unwrap_model(model), "all_tied_weights_keys", None) or {}


def _offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((inner for inner in hooks if isinstance(inner, AlignDevicesHook) and inner.offload), None)


@contextmanager
def arrivals(lent: list[Lent], arrived: Arrival) -> Iterator[None]:
    """Inside, `arrived(path, weight)` is called for each weight on loan; each loan is another tensor."""
    names: dict[nn.Module, list[Lent]] = {}
    for weight in lent:
        names.setdefault(weight.module, []).append(weight)
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
        for weight in self.lent:
            self.arrived(weight.path, module.get_parameter(weight.own))
        return args, kwargs


@contextmanager
def stand_ins_kept(model: nn.Module, lent: list[Lent]) -> Iterator[None]:
    """Afterwards the placeholders of lent weights are those from before; accelerate makes new ones at each loan."""
    holders = {weight.module.get_submodule(weight.own.rpartition(".")[0]) for weight in lent}
    before = [(holder, name, weight) for holder in holders for name, weight in holder._parameters.items()]
    tied: dict[str, list[str]] = {}
    for name, source in _ties(model).items() if lent else ():
        tied.setdefault(source, [source]).append(name)
    # To one of them that is in place; a forward pass undoes that
    retie_parameters(unwrap_model(model), list(tied.values()))
    try:
        yield
    finally:
        for holder, name, weight in before:
            holder._parameters[name] = weight
