"""The block map: which parameters form `embeddings`, each repeated layer, `final_norm` and `head`.

Everything else in the package asks this map; nobody else parses parameter names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from ..errors import SurgicalError
from .layer_stacks import find_stacks
from .module_lists import join
from .partition import block_owners, describe_structure, ordered
from .unwrap import bare_parameter_name, unwrap_model

PART = "/"  # between a layer and a part of it
_STACK_INDEX = re.compile(r"(?P<stack>[^\[\]]+)\[(?P<index>[^\[\]]*)\]")
_SLICE = re.compile(r"-?\d*:-?\d*(?::-?\d+)?")


@dataclass(frozen=True)
class BlockMap:
    """Which block each parameter of a model belongs to: a partition, in the order of execution.

    Attributes:
        names: block names, e.g. `("embeddings", "0", ..., "11", "final_norm", "head")`. With two or more stacks the
            repeated layers carry their stack: `("embeddings", "encoder.0", ..., "decoder.0", ..., "head")`. The stages
            of a hierarchical net are stacks too, whatever its author calls them: `"stages.2.5"` is the sixth layer of
            the third stage, `"stages.2.embeddings"` what leads into that stage, e.g. its downsampling.
        modules: for each block the paths of the largest modules that hold exactly its parameters, as in the bare
            model (no PEFT containers); they may hold weights tied to an earlier block besides. A path that names a
            parameter stands for one that no such module holds.
        stacks: for each stack (`""` when there is only one) its block names, first layer first.
        tied: for the second and further names of tied weights, and the modules that hold them, the block of the first.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> BlockMap.find(ViTModel(ViTConfig(num_hidden_layers=2), add_pooling_layer=False)).names
        ('embeddings', '0', '1', 'final_norm')
    """

    names: tuple[str, ...]
    modules: dict[str, tuple[str, ...]]
    stacks: dict[str, tuple[str, ...]]
    tied: dict[str, str]
    model_name: str

    @classmethod
    def find(cls, model: nn.Module) -> BlockMap:
        """Read the block map off `model`, bare or wrapped by PEFT, DDP, FSDP or `torch.compile`.

        Raises:
            SurgicalError: no list of repeated layers was found; the message lists what was.
        """
        model = unwrap_model(model)
        found = find_stacks(model)
        if not found:
            raise SurgicalError(
                f"no repeated blocks found in {type(model).__name__}: none of its lists (nn.ModuleList, "
                f"nn.Sequential) is evidently one of layers. {describe_structure(model)} Choose modules by name "
                "instead: SurgicalConfig(target_modules=[...])."
            )
        owners, tied = block_owners(model, found)
        names = ordered(set(owners.values()), found)
        modules = {block: tuple(path for path, owner in owners.items() if owner == block) for block in names}
        stacks = {
            stack.label: tuple(join(stack.label, str(index)) for index in range(len(stack.layers))) for stack in found
        }
        return cls(names=names, modules=modules, stacks=stacks, tied=tied, model_name=type(model).__name__)

    def block_of(self, name: str) -> str:
        """The block that a parameter or module name belongs to; containers in the name are ignored.

        Raises:
            SurgicalError: the name lies in no block.

        Example:
            >>> blocks.block_of("vit.layers.3.attention.q_proj.weight")
            '3'
        """
        path = bare_parameter_name(name)
        while path:
            if path in self._owners:
                return self._owners[path]
            path = path.rpartition(".")[0]
        raise SurgicalError(f"{name!r} belongs to no block of {self.model_name}. Blocks: {_listed(self.names)}.")

    @cached_property
    def _owners(self) -> dict[str, str]:
        return {**self.tied, **{path: block for block, paths in self.modules.items() for path in paths}}

    def named_parameters(self, model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
        """For each block the parameters of `model` by name: a partition, tied weights once, under their first name."""
        grouped: dict[str, dict[str, nn.Parameter]] = {block: {} for block in self.names}
        for name, parameter in model.named_parameters():
            grouped[self.block_of(name)][name] = parameter
        return grouped

    def parameters(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """For each block the parameters of `model`: a partition, tied weights once.

        Example:
            >>> {block: sum(p.numel() for p in group) for block, group in blocks.parameters(model).items()}
        """
        return {block: list(named.values()) for block, named in self.named_parameters(model).items()}

    def parse(self, spec: int | str | Iterable[int | str]) -> tuple[str, ...]:
        """Turn what a user says into block names, in the map's order.

        Args:
            spec: an index into the repeated layers (negative counts from the last), a slice as a string (`"0:3"`,
                `"-2:"`), a block name, `"all"` (every block, embeddings and head too), one of these for a named
                stack (`"decoder[-2:]"`), or a list of any of them.

        Raises:
            SurgicalError: unknown name, index out of range, the same block twice, nothing selected by the whole or by
                one part of it, or an index without a stack where the model has several.

        Example:
            >>> blocks.parse([0, -1, "head"])
            ('0', '11', 'head')
        """
        parts = list(spec) if isinstance(spec, Iterable) and not isinstance(spec, str) else [spec]
        chosen: list[str] = []
        for part in parts:
            for block in self._parse_one(part):
                if block in chosen:
                    raise SurgicalError(f"block {block!r} is named twice in {spec!r}: name it once.")
                chosen.append(block)
        if not chosen:
            raise SurgicalError(f"{spec!r} selects no block. Choose at least one of: {_listed(self.names)}.")
        return tuple(block for block in self.names if block in chosen)

    def divided(self, parts: Sequence[str]) -> BlockMap:
        """A map of parts to search among, such as attention | MLP, in place of each repeated layer.

        A part is named by its layer and a module in it, as `SurgicalConfig(target_modules={layer: [module]})` takes
        it. What the parts leave out of a layer, its norms for example, belongs to no part.

        Raises:
            SurgicalError: no part, or one twice.

        Example:
            >>> blocks.divided(["attention", "mlp"]).names
            ('embeddings', '0/attention', '0/mlp', '1/attention', '1/mlp', 'final_norm', 'head')
        """
        if not parts or len(set(parts)) != len(parts):
            raise SurgicalError(f"{list(parts)!r} does not divide a layer: name each part once, at least one.")
        repeated = {name for stack in self.stacks.values() for name in stack}

        def of(names: Iterable[str]) -> tuple[str, ...]:
            return tuple(
                each
                for name in names
                for each in ([f"{name}{PART}{part}" for part in parts] if name in repeated else [name])
            )

        return replace(
            self, names=of(self.names), stacks={label: of(stack) for label, stack in self.stacks.items()}, modules={}
        )

    def _parse_one(self, part: Any) -> tuple[str, ...]:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise SurgicalError(
                f"{part!r} is not a block: give an index, a slice such as '0:3', or a name. "
                f"Blocks: {_listed(self.names)}."
            )
        if part == "all":
            return self.names
        if part in self.names:
            return (str(part),)
        if isinstance(part, str) and (match := _STACK_INDEX.fullmatch(part)):
            stack, inner = match["stack"], match["index"].strip()
            if stack not in self.stacks:
                raise SurgicalError(
                    f"{part!r}: {self.model_name} has no stack {stack!r}. It has {self._stack_names()}."
                )
            return self._index(inner, stack, part)
        if isinstance(part, int) or re.fullmatch(r"-?\d+", part) or _SLICE.fullmatch(part):
            if len(self.stacks) > 1:
                example = f"{list(self.stacks)[-1]}[{part}]"
                raise SurgicalError(
                    f"{part!r} does not say which stack: {self.model_name} has {self._stack_names()}. "
                    f"Name one, for example {example!r}."
                )
            return self._index(str(part), next(iter(self.stacks)), part)
        tied = [path for path in self.tied if path.rpartition(".")[0] not in self.tied]  # modules rather than weights
        ties = ", ".join(f"{path} is in {self.tied[path]!r}" for path in tied)
        raise SurgicalError(
            f"block {part!r} does not exist in {self.model_name}. Blocks: {_listed(self.names)}; indices, slices such "
            f"as {self._slice_example()!r}, and 'all' are understood too."
            + (f" Tied weights count once: {ties}." if ties else "")
        )

    def _index(self, text: str, stack: str, given: Any) -> tuple[str, ...]:
        blocks = self.stacks[stack]
        size = len(blocks)
        where = f"{self.model_name}{f' ({stack})' if stack else ''} has {size} repeated blocks, 0 to {size - 1}"
        if _SLICE.fullmatch(text):
            start, stop, step = ([int(n) if n else None for n in text.split(":")] + [None])[:3]
            if any(bound is not None and not -size <= bound <= size for bound in (start, stop)) or step == 0:
                raise SurgicalError(f"{given!r} is out of range: {where}. Negative numbers count from the last.")
            if not blocks[start:stop:step]:
                raise SurgicalError(f"{given!r} selects no block: {where}. The end of a slice is not in it.")
            return blocks[start:stop:step]
        if not re.fullmatch(r"-?\d+", text):
            raise SurgicalError(f"{given!r} is not understood: put an index or a slice in the brackets. {where}.")
        if not -size <= int(text) < size:
            raise SurgicalError(f"block {given!r} does not exist: {where}. Negative numbers count from the last: -1.")
        return (blocks[int(text)],)

    def _slice_example(self) -> str:
        stack = next(reversed(self.stacks))
        return f"{stack}[-2:]" if stack else "-2:"

    def _stack_names(self) -> str:
        named = " and ".join(f"{stack!r} ({len(blocks)} blocks)" for stack, blocks in self.stacks.items() if stack)
        return named or "one stack, which has no name: leave it out"


def _listed(names: Iterable[str]) -> str:
    """Names for an error message; a long run of numbered blocks is cut in the middle."""
    shown = list(names)
    if len(shown) > 20:
        shown = [*shown[:6], "...", *shown[-6:]]
    return ", ".join(shown)


def is_head(block: str) -> bool:
    """Whether a block name is a head: `head`, or `vision_model.head` where there are several stacks."""
    return block.rpartition(".")[2] == "head"
