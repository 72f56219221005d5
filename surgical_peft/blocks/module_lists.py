"""Classifies each list in a bare model: one of layers, of stages of layers, or neither.

No table of model names. A list (`nn.ModuleList`, `nn.Sequential`) may be one of layers if each member holds two or
more weight matrices: a lone linear map, convolution or norm is a part of a layer. It is one of stages if its members
consist of layers themselves. Experts lie within a layer: no list within a layer is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeGuard

import torch
from torch import nn

from .unwrap import named_bare_modules, named_children, unwrap_module


@dataclass(frozen=True)
class ModuleRow:
    """A list: its path, the members that hold parameters by path, and the path of the model that it lies in."""

    path: str
    members: Mapping[str, nn.Module]
    scope: str
    ordered: bool  # nn.Sequential: what is in it need not be alike

    @cached_property
    def size(self) -> int:
        """Number of weights that its members hold."""
        return sum(size_of(member) for member in self.members.values())

    @cached_property
    def attends(self) -> bool:
        """True if any member holds attention."""
        return any(_attends(member) for member in self.members.values())

    @cached_property
    def inner(self) -> dict[str, ModuleRow]:
        """For each member that consists of layers the list of them."""
        return {path: inner for path, member in self.members.items() if (inner := _main_list(path, member))}

    @cached_property
    def is_stages(self) -> bool:
        """True if its members consist of layers: each holds attention and more, or their number or width changes."""
        inner = list(self.inner.values())
        if len(inner) < 2 or 2 * len(inner) <= len(self.members):
            return False
        if len({len(row.members) for row in inner}) > 1:
            return True
        first, last = _shapes(inner[0]), _shapes(inner[-1])
        narrower = 2 * len(first & last) < len(first | last)
        return narrower or (len(inner[0].members) > 1 and all(row.is_transformer for row in inner))

    @cached_property
    def is_transformer(self) -> bool:
        """True if each member holds attention and is not attention itself."""
        return all(_attends(member) and not _is_attention(member) for member in self.members.values())

    @cached_property
    def is_layers(self) -> bool:
        """True if each member holds two weight matrices, and it is no list of towers or of unlike parts."""
        if not self.members or not all(_matrices(member) >= 2 for member in self.members.values()):
            return False
        if self.attends:  # a list of a tower, or of a tower and other things, is not one of layers
            towers = [inner for inner in self.inner.values() if inner.is_transformer]
            return not towers or len(towers) == len(self.members) > 1
        return not self.ordered or len({type(member) for member in self.members.values()}) == 1 < len(self.members)


def rows_of(module: nn.Module, path: str = "", scope: str = "") -> Iterator[ModuleRow]:
    """Every list that lies in no other list of layers or stages."""
    module = unwrap_module(module)
    scope = path if is_a(module, "PreTrainedModel") else scope
    members = members_of(module, path)
    if is_list(module):
        yield (row := ModuleRow(path, members, scope, isinstance(module, nn.Sequential)))
        if row.is_stages or row.is_layers:
            return
    numbered = {name: child for name, child in members.items() if is_list(child) and re.search(r"[a-z]\d+$", name)}
    if len({name.rstrip("0123456789") for name in numbered}) == 1 < len(numbered):  # layer1, layer2, ... of ResNet
        row = ModuleRow(next(iter(numbered)).rstrip("0123456789"), numbered, scope, False)
        if row.is_stages:
            yield row
            members = {name: child for name, child in members.items() if name not in numbered}
    for name, child in members.items():
        yield from rows_of(child, name, scope)


def _main_list(path: str, member: nn.Module) -> ModuleRow | None:
    """The list of layers that holds at least half of a member's parameters, if it has one."""
    whole = size_of(member)
    for inside, module in named_bare_modules(member, path):
        if is_list(module) and "expert" not in inside:
            row = ModuleRow(inside, members_of(module, inside), "", isinstance(module, nn.Sequential))
            is_layers = row.members and all(_matrices(layer) >= 2 for layer in row.members.values())
            if is_layers and 2 * row.size >= whole:
                return row
    return None


def members_of(module: nn.Module, path: str) -> dict[str, nn.Module]:
    """The children that hold parameters, by path."""
    children = {join(path, name): unwrap_module(child) for name, child in named_children(module)}
    return {name: child for name, child in children.items() if any(True for _ in _parameters(child))}


def is_list(module: nn.Module) -> TypeGuard[nn.ModuleList | nn.Sequential]:
    """True for a list of modules."""
    return isinstance(module, nn.ModuleList | nn.Sequential)


def is_a(module: nn.Module, name: str) -> bool:
    """True if a class of this name is among the module's bases."""
    return any(base.__name__ == name for base in type(module).__mro__)


def _is_attention(module: nn.Module) -> bool:
    return re.search("atten|attn", type(module).__name__.lower()) is not None


def is_norm(module: nn.Module) -> bool:
    """True if the class is called a norm, which covers those that a model defines itself."""
    return "norm" in type(module).__name__.lower()


def _attends(module: nn.Module) -> bool:
    return any(_is_attention(part) for _, part in named_bare_modules(module))


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The bare module's own parameters, without those that LoRA and others add."""
    for _, part in named_bare_modules(module):
        yield from part.parameters(recurse=False)


def size_of(module: nn.Module) -> int:
    """Number of weights that the bare module holds."""
    return sum(shape_of(parameter).numel() for parameter in _parameters(module))


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The shape of a weight, also of one that DeepSpeed's ZeRO-3 has sharded, which leaves an empty tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _matrices(module: nn.Module) -> int:
    """Weights of linear maps (4-bit ones are one column) and convolutions, not scales such as (channels, 1, 1)."""
    shapes = [shape_of(parameter) for parameter in _parameters(module)]
    return sum(len(shape) == 2 or sum(size > 1 for size in shape) >= 2 for shape in shapes)


def _shapes(row: ModuleRow) -> set[tuple[int, ...]]:
    return {tuple(shape_of(parameter)) for member in row.members.values() for parameter in _parameters(member)}


def join(prefix: str, name: str) -> str:
    """`prefix.name`, or `name` if there is no prefix."""
    return f"{prefix}.{name}" if prefix else name


def within(path: str, homes: Iterable[str]) -> bool:
    """True if `path` is one of `homes` or lies inside of one."""
    return any(path == home or path.startswith(home + ".") for home in homes)


def inside(name: str, path: str) -> bool:
    """True if `name` lies inside of `path`, where "" is the whole model."""
    return not path or name.startswith(path + ".")
