"""Resolves a choice of modules to its tensors: parameters, and the buffers that are saved with them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ...blocks.module_lists import inside, join, parents
from ...blocks.unwrap import named_bare_modules
from ...errors import SurgicalError
from .row_names import split_row, tensor_of

Targets = Mapping[str, Collection[str] | None]  # path of a module -> names of parameters in it; None for all


def united(*targets: Targets) -> dict[str, Collection[str] | None]:
    """The union of `targets`.

    Example:
        >>> united({"0": ["bias"]}, {"0": ["weight"], "1": None})
        {'0': ['bias', 'weight'], '1': None}
    """
    union: dict[str, Collection[str] | None] = {}
    for path, names in [item for group in targets for item in group.items()]:
        before = union.get(path, ())
        union[path] = None if names is None or before is None else sorted({*before, *names})
    return union


@dataclass(frozen=True)
class Place:
    """The place of a tensor: an attribute of a module."""

    module: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        """The tensor in this place."""
        if row := split_row(self.attribute):
            return self.module._parameters[row[0]].data[row[1]]  # type: ignore[union-attr]
        tensor = self.module._parameters.get(self.attribute)
        return self.module._buffers[self.attribute] if tensor is None else tensor  # type: ignore[return-value]

    @property
    def is_parameter(self) -> bool:
        """True for a parameter, False for a buffer."""
        return tensor_of(self.attribute) in self.module._parameters


def put(module: nn.Module, attribute: str, tensor: Tensor) -> None:
    """Set `tensor` in a module in place of a parameter or buffer."""
    if type(module).__setattr__ is not nn.Module.__setattr__:  # it keeps a list of its own, as an LSTM does
        notes = dict(tensor.__dict__)
        tensor.__dict__.clear()  # accelerate's init_empty_weights would hand them to the class that it builds anew
        try:
            setattr(module, attribute, tensor)
        finally:
            tensor.__dict__.update(notes)
    where: Any = module._parameters if attribute in module._parameters else module._buffers
    where[attribute] = tensor  # init_empty_weights has put another one there, on the meta device


@dataclass(frozen=True)
class TensorMap:
    """The parameters and saved buffers of a bare model.

    Attributes:
        places: for each tensor all places where it stands, by the first of its names.
        first: for every name the first name of the same tensor: another one if it is tied to an earlier one.
    """

    places: dict[str, list[Place]]
    first: dict[str, str]

    @classmethod
    def find(cls, model: nn.Module) -> TensorMap:
        """Read the map off `model`, bare or wrapped."""
        places: dict[str, list[Place]] = {}
        first: dict[str, str] = {}
        seen: dict[int, str] = {}
        for path, module in named_bare_modules(model):
            saved = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
            for attribute, tensor in [*module._parameters.items(), *saved.items()]:
                if tensor is None:
                    continue
                full = join(path, attribute)
                first[full] = seen.setdefault(id(tensor), full)
                place = Place(module, attribute)
                if place not in places.setdefault(first[full], []):  # a module may have two names
                    places[first[full]].append(place)
        return cls(places, first)

    @cached_property
    def _inside(self) -> dict[str, list[str]]:
        """For each module the names of the tensors in it."""
        names: dict[str, list[str]] = {"": list(self.first)}
        for name in self.first:
            for path in parents(name):
                names.setdefault(path, []).append(name)
        return names

    def at(self, name: str) -> list[Place]:
        """The places of the tensor whose first name this is, or of a row of one."""
        if (row := split_row(name)) is None:
            return self.places[name]
        return [Place(place.module, f"{place.attribute}[{row[1]}]") for place in self.places[row[0]]]

    def first_name(self, name: str) -> str | None:
        """The first name of the tensor, or of the row of one, that goes by `name`; None if there is none."""
        row = split_row(name)
        first = self.first.get(row[0] if row else name)
        return f"{first}[{row[1]}]" if row and first else first

    def parameters(self, path: str) -> list[str]:
        """The names, as they are, of all parameters in the module at `path`."""
        return [name for name in self._inside.get(path, ()) if self.places[self.first[name]][0].is_parameter]

    def chosen(self, targets: Targets) -> dict[str, bool]:
        """The tensors that `targets` stand for by their first names, and whether each was asked for by its name.

        Buffers come with the parameters beside them, and those of whole modules with the module.

        Example:
            >>> TensorMap.find(nn.Sequential(nn.BatchNorm1d(2))).chosen({"0": ["bias"]})
            {'0.bias': True, '0.running_mean': False, '0.running_var': False, '0.num_batches_tracked': False}
        """
        choice: dict[str, bool] = {}
        for path, names in targets.items():
            asked = set(self.parameters(path) if names is None else [join(path, name) for name in names])
            rows = [name for name in asked if split_row(name)]
            whole = asked.difference(rows)
            homes = {path} if names is not None and not names else {name.rpartition(".")[0] for name in whole}
            for name in self._inside.get(path, ()):
                first = self.first[name]
                if self.places[first][0].is_parameter:
                    if name in asked:
                        choice[first] = True
                elif names is None or name.rpartition(".")[0] in homes:
                    choice[first] = False
            choice |= {row: True for name in sorted(rows) if (row := self.first_name(name))}
        return choice

    def untied(
        self, targets: dict[str, set[str] | None], elsewhere: Collection[str] = ()
    ) -> dict[str, set[str] | None]:
        """`targets` in which a tied weight is said once, by its first name, and one of `elsewhere` not at all.

        Args:
            elsewhere: first names of weights that belong to other blocks than the chosen ones.
        """
        whole: dict[str, set[str] | None] = {}
        moved: list[str] = []
        for path, names in targets.items():
            asked = self.parameters(path) if names is None else [join(path, name) for name in sorted(names)]
            firsts = {name: first for name in asked if (first := self.first_name(name)) and first not in elsewhere}
            kept = [name for name, first in firsts.items() if inside(first, path)]
            moved += [first for first in firsts.values() if not inside(first, path)]
            if names is None and len(kept) == len(asked):
                whole[path] = None
            elif kept or not asked:
                whole[path] = {name[len(path) + 1 if path else 0 :] for name in kept}
        there = self.chosen(whole)
        for first in dict.fromkeys(moved):
            if first not in there:
                path, _, attribute = first.rpartition(".")
                names = {*(whole.get(path) or ()), attribute}
                whole[path] = None if set(self.parameters(path)) == {join(path, n) for n in names} and path else names
        return whole

    def tied(self, names: Iterable[str]) -> list[list[str]]:
        """For each of the first `names` whose tensor stands in several places, all its names."""
        again: dict[str, list[str]] = {}
        for name, first in self.first.items():
            again.setdefault(first, []).append(name)
        return [again[name] for name in names if len(again.get(name, ())) > 1]

    def check_alone(self, names: Iterable[str]) -> None:
        """Refuse tensors whose memory another one uses, too: exchanged alone, one would miss the other's values.

        Raises:
            SurgicalError: they overlap; the message names both.
        """
        wanted = {tensor_of(name) for name in names}
        spans = sorted(
            (*_span(places[0].tensor), name) for name, places in self.places.items() if _is_here(places[0].tensor)
        )
        reach, last = (-1, -1), ""
        for device, begin, end, name in spans:
            if last and device == reach[0] and begin < reach[1] and {name, last} & wanted:
                tuned, other = (name, last) if name in wanted else (last, name)
                raise SurgicalError(
                    f"{tuned} shares its memory with {other}, and the two are not one parameter: tuning it would "
                    f"leave {other} behind. Tie them by one nn.Parameter, give one a copy of its own, or choose other "
                    "modules."
                )
            if not last or device != reach[0] or end > reach[1]:
                reach, last = (device, end), name


def _is_here(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0


def _span(tensor: Tensor) -> tuple[int, int, int]:
    """A number for the device of a tensor, its first byte, and the one behind its last."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in strides) * tensor.element_size()
    begin = tensor.data_ptr()
    return tensor.get_device(), begin, begin + last + tensor.element_size()
