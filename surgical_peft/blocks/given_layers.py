"""Stacks of layers that the user names, for models whose lists do not show which of them are layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..errors import SurgicalError
from ..validation import nearest
from .layer_stacks import Stack, homes_of, shared_depth, stack_labels
from .module_lists import contents_of, join, members_of
from .partition import describe_structure
from .unwrap import named_bare_modules, nested_models

Layers = str | Sequence[str]


def as_paths(layers: Layers | None) -> tuple[str, ...]:
    """The paths in the order given; none for None.

    Raises:
        SurgicalError: neither a string nor a list of them, or an empty one.
    """
    if layers is None:
        return ()
    paths = (layers,) if isinstance(layers, str) else tuple(layers) if isinstance(layers, list | tuple) else ()
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise SurgicalError(
            f"layers={layers!r} names no layers: give the path of their list, such as 'encoder.blocks', a pattern for "
            "the layers themselves, such as 'encoder.layer*', or a list of these, one for each stack."
        )
    return paths


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """The configs of the adapters in `model`, by name."""
    every: dict[str, Any] = {}
    for nested in nested_models(model):
        configs = nested.__dict__.get("peft_config")  # PEFT puts it on the tuner, and on the model inside
        every |= configs if isinstance(configs, dict) else {}
    return every


def layers_of_adapters(model: nn.Module) -> tuple[str, ...]:
    """The paths of layers that the configs of the adapters in `model` hold; none if they hold none."""
    paths = (as_paths(getattr(config, "layers", None)) for config in adapter_configs(model).values())
    return next(filter(None, paths), ())


def stacks_at(model: nn.Module, paths: Sequence[str]) -> list[Stack]:
    """A stack for each path in the bare `model`, in the order given, which is taken for that of execution.

    Raises:
        SurgicalError: a path without a module, of a module that is no list, without layers that hold parameters, or
            with layers that lie in other layers.
    """
    modules = dict(named_bare_modules(model))
    stacks = {path: _layers_at(path, modules) for path in paths}
    _check_apart(stacks, paths)
    places = {path: ".".join(part for part in path.replace("*", "").split(".") if part) for path in stacks}
    if len(set(places.values())) < len(places):
        raise SurgicalError(f"layers={list(paths)}: two of these differ by a * alone: give the lists one by one.")
    shared = shared_depth(list(places.values()))
    labels = stack_labels(list(places.values()), shared)
    while shared and any(label[:1].isdigit() for label in labels.values()):  # "stages.0" rather than "0"
        shared -= 1
        labels = stack_labels(list(places.values()), shared)
    return [
        Stack(
            label := labels[places[path]],
            tuple((layer,) for layer in layers),
            places[path],
            homes_of(places[path], label, shared),
        )
        for path, layers in stacks.items()
    ]


def _layers_at(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The paths of the layers that `path` names: the members of a list, or what matches the pattern."""
    model = modules[""]
    if "*" in path:
        matching = {name: module for name, module in modules.items() if name and _matches(name, path)}
        first = {id(module): name for name, module in reversed(matching.items())}  # a module under two names
        layers = [name for name, module in matching.items() if first[id(module)] == name and _has_weights(module)]
        if not layers:
            fault = "of what matches holds a parameter" if matching else "matches (a * stands for part of one name)"
            raise SurgicalError(
                f"layers={path!r}: no module of {type(model).__name__} {fault}. {describe_structure(model)}"
            )
        return layers
    if path not in modules:
        raise SurgicalError(
            f"layers={path!r}: {type(model).__name__} has no module of that path: {nearest(path, modules)}"
            f"{describe_structure(model)}"
        )
    module = modules[path]
    if not isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        children = ", ".join(join(path, name) for name, _ in module.named_children())
        raise SurgicalError(
            f"layers={path!r} is a {type(module).__name__}, not a list (nn.ModuleList, nn.Sequential, nn.ModuleDict): "
            f"give the path of a list in it, or a pattern for the layers, such as {join(path, 'layer*')!r}. "
            f"It holds: {children or 'no modules'}."
        )
    if not (members := members_of(module, path, contents_of(module))):
        raise SurgicalError(f"layers={path!r}: the list is empty, or nothing in it holds a parameter: name another.")
    return list(members)


def _matches(name: str, pattern: str) -> bool:
    """True if each part of a path matches that of the pattern, in which `*` stands for any characters but a dot."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _check_apart(stacks: Mapping[str, Sequence[str]], paths: Sequence[str]) -> None:
    """Refuse a layer that is named twice or lies in another."""
    layers = [layer for stack in stacks.values() for layer in stack]
    for layer in layers:
        inside = [other for other in layers if other.startswith(layer + ".")]
        if inside or layers.count(layer) > 1 or len(stacks) < len(paths):
            fault = f"{inside[0]!r} lies in {layer!r}" if inside else f"{layer!r} is named twice"
            raise SurgicalError(
                f"layers={list(paths)}: {fault}. Every layer is named once, and holds no other: leave one out."
            )
