"""Classifies each list in a bare model: one of layers, of stages of layers, or neither.

No table of model names. A list (`nn.ModuleList`, `nn.Sequential`) may be one of layers if each member holds two or
more weight matrices: a lone linear map, convolution or norm is a part of a layer. It is one of stages if its members
consist of layers themselves. Experts lie within a layer: no list within a layer is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeGuard

import torch
from torch import nn

from .unwrap import named_bare_modules, named_children, unwrap_module


@dataclass(frozen=True)
class Contents:
    """What a bare module and the modules in it hold.

    Attributes:
        parameters: how many, without those that LoRA and others add.
        size: number of weights in them.
        matrices: how many are weights of linear maps and convolutions.
        attends: True if one of the modules is attention.
    """

    parameters: int
    size: int
    matrices: int
    attends: bool


def contents_of(model: nn.Module) -> dict[nn.Module, Contents]:
    """The contents of each bare module of a model, read once: lists in lists would be read again at every level."""
    contents: dict[nn.Module, Contents] = {}
    for _, module in reversed(list(named_bare_modules(model))):  # what is in a module comes before it
        shapes = [shape_of(parameter) for parameter in module.parameters(recurse=False)]
        children = [contents[unwrap_module(child)] for _, child in named_children(module)]
        contents[module] = Contents(
            len(shapes) + sum(child.parameters for child in children),
            sum(shape.numel() for shape in shapes) + sum(child.size for child in children),
            sum(map(is_matrix, shapes)) + sum(child.matrices for child in children),
            is_attention(module) or any(child.attends for child in children),
        )
    return contents


@dataclass(frozen=True)
class ModuleRow:
    """A list: its path, the members that hold parameters by path, and the path of the model that it lies in."""

    path: str
    members: Mapping[str, nn.Module]
    scope: str
    ordered: bool  # nn.Sequential: what is in it need not be alike
    contents: Mapping[nn.Module, Contents] = field(repr=False)

    @cached_property
    def size(self) -> int:
        """Number of weights that its members hold."""
        return sum(self.contents[member].size for member in self.members.values())

    @cached_property
    def attends(self) -> bool:
        """True if any member holds attention."""
        return any(self.contents[member].attends for member in self.members.values())

    @cached_property
    def inner(self) -> dict[str, ModuleRow]:
        """For each member that consists of layers the list of them."""
        members = self.members.items()
        return {path: inner for path, member in members if (inner := _main_list(path, member, self.contents))}

    @cached_property
    def has_matrices(self) -> bool:
        """True if each member holds two weight matrices."""
        return bool(self.members) and all(self.contents[member].matrices >= 2 for member in self.members.values())

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
        return all(self.contents[member].attends and not is_attention(member) for member in self.members.values())

    @cached_property
    def is_layers(self) -> bool:
        """True if each member holds two weight matrices, and it is no list of towers or of unlike parts."""
        if not self.has_matrices:
            return False
        if self.attends:  # a list of a tower, or of a tower and other things, is not one of layers
            towers = [inner for inner in self.inner.values() if inner.is_transformer]
            return not towers or len(towers) == len(self.members) > 1
        return not self.ordered or len({type(member) for member in self.members.values()}) == 1 < len(self.members)


def rows_of(
    module: nn.Module, contents: Mapping[nn.Module, Contents], path: str = "", scope: str = ""
) -> Iterator[ModuleRow]:
    """Every list that lies in no other list of layers or stages."""
    module = unwrap_module(module)
    scope = path if is_a(module, "PreTrainedModel") else scope
    members = members_of(module, path, contents)
    if is_list(module):
        yield (row := ModuleRow(path, members, scope, isinstance(module, nn.Sequential), contents))
        if row.is_stages or row.is_layers:
            return
    numbered = {name: child for name, child in members.items() if is_list(child) and re.search(r"[a-z]\d+$", name)}
    if len({name.rstrip("0123456789") for name in numbered}) == 1 < len(numbered):  # layer1, layer2, ... of ResNet
        row = ModuleRow(next(iter(numbered)).rstrip("0123456789"), numbered, scope, False, contents)
        if row.is_stages:
            yield row
            members = {name: child for name, child in members.items() if name not in numbered}
    for name, child in members.items():
        yield from rows_of(child, contents, name, scope)


def _main_list(path: str, member: nn.Module, contents: Mapping[nn.Module, Contents]) -> ModuleRow | None:
    """The list of layers that holds at least half of a member's parameters, if it has one."""
    whole = contents[member].size
    for inside, module in named_bare_modules(member, path):
        if is_list(module) and "expert" not in inside:
            members = members_of(module, inside, contents)
            row = ModuleRow(inside, members, "", isinstance(module, nn.Sequential), contents)
            if row.has_matrices and 2 * row.size >= whole:
                return row
    return None


def members_of(module: nn.Module, path: str, contents: Mapping[nn.Module, Contents]) -> dict[str, nn.Module]:
    """The children that hold parameters, by path."""
    children = {join(path, name): unwrap_module(child) for name, child in named_children(module)}
    return {name: child for name, child in children.items() if contents[child].parameters}


def is_list(module: nn.Module) -> TypeGuard[nn.ModuleList | nn.Sequential]:
    """True for a list of modules."""
    return isinstance(module, nn.ModuleList | nn.Sequential)


def is_a(module: nn.Module, name: str) -> bool:
    """True if a class of this name is among the module's bases."""
    return any(base.__name__ == name for base in type(module).__mro__)


def is_attention(module: nn.Module) -> bool:
    """True if the class is called attention."""
    return re.search("atten|attn", type(module).__name__.lower()) is not None


def is_norm(module: nn.Module) -> bool:
    """True if the class is called a norm, which covers those that a model defines itself."""
    return "norm" in type(module).__name__.lower()


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The shape of a weight, also of one that DeepSpeed's ZeRO-3 has sharded, which leaves an empty tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def is_matrix(shape: torch.Size) -> bool:
    """True for a linear map (a 4-bit one is one column) or a convolution, not for scales such as (channels, 1, 1)."""
    return len(shape) == 2 or sum(size > 1 for size in shape) >= 2


def _shapes(row: ModuleRow) -> set[tuple[int, ...]]:
    modules = (module for member in row.members.values() for _, module in named_bare_modules(member))
    return {tuple(shape_of(parameter)) for module in modules for parameter in module.parameters(recurse=False)}


def join(prefix: str, name: str) -> str:
    """`prefix.name`, or `name` if there is no prefix."""
    return f"{prefix}.{name}" if prefix else name


def within(path: str, homes: Iterable[str]) -> bool:
    """True if `path` is one of `homes` or lies inside of one; of many homes a set or dictionary is quickest."""
    homes = homes if isinstance(homes, Set | Mapping) else set(homes)
    return path in homes or any(parent in homes for parent in parents(path))


def parents(path: str) -> Iterator[str]:
    """The paths that `path` lies inside of, but for the whole model, innermost first.

    Example:
        >>> list(parents("layers.0.attention"))
        ['layers.0', 'layers']
    """
    while path := path.rpartition(".")[0]:
        yield path


def inside(name: str, path: str) -> bool:
    """True if `name` lies inside of `path`, where "" is the whole model."""
    return not path or name.startswith(path + ".")
