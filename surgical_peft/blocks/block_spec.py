"""The grammar of `BlockMap.parse`: indices, slices and names of blocks, also of one stack among several."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import SurgicalError
from ..validation import nearest
from .towers import KNOWN, PROJECTOR, projector_in, tower_blocks, towers_of

_STACK_INDEX = re.compile(r"(?P<stack>[^\[\]]+)\[(?P<index>[^\[\]]*)\]")
INDEX = re.compile(r"-?\d{1,18}")  # `int` refuses thousands of digits
SLICE = re.compile(r"-?\d{0,18}:-?\d{0,18}(?::-?\d{1,18})?")


@dataclass(frozen=True)
class BlockGrammar:
    """Reads one entry of a choice of blocks; the attributes are those of the [`BlockMap`][surgical_peft.BlockMap]."""

    names: tuple[str, ...]
    stacks: dict[str, tuple[str, ...]]
    tied: dict[str, str]
    model_name: str
    modules: dict[str, tuple[str, ...]]

    def parse(self, part: Any) -> tuple[str, ...]:
        """The names of the blocks that one entry of a choice stands for.

        Raises:
            SurgicalError: as `BlockMap.parse`.
        """
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise SurgicalError(
                f"{part!r} is not a block: give an index, a slice such as '0:3', or a name. "
                f"Blocks: {listed(self.names)}."
            )
        if part == "all":
            return self.names
        if part in self.names:
            return (str(part),)
        if isinstance(part, str) and (part in KNOWN or part in towers_of(self.names)):
            return self._tower(part)
        if isinstance(part, str) and (match := _STACK_INDEX.fullmatch(part)):
            stack, inner = match["stack"], match["index"].strip()
            if stack not in self.stacks:
                raise SurgicalError(
                    f"{part!r}: {self.model_name} has no stack {stack!r}. It has {self._stack_names()}."
                )
            return self._index(inner, stack, part)
        if isinstance(part, int) or INDEX.fullmatch(part) or SLICE.fullmatch(part):
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
            f"block {part!r} does not exist in {self.model_name}: {nearest(part, self.names)}Blocks: "
            f"{listed(self.names)}; indices, slices such as {self._slice_example()!r}, and 'all' are understood too."
            + (f" Tied weights count once: {ties}." if ties else "")
        )

    def _tower(self, name: str) -> tuple[str, ...]:
        modules = {block: self.modules.get(block, ()) for block in self.names}
        projector = projector_in(modules) if name == PROJECTOR else {}
        apart = {block: paths for block, paths in projector.items() if set(paths) != set(modules[block])}
        if apart:
            block, paths = next(iter(apart.items()))
            raise SurgicalError(
                f"{name!r}: of {self.model_name} it is part of block {block!r}, beside "
                f"{listed(path for path in modules[block] if path not in paths)}. Name its modules: "
                f"SurgicalConfig(target_modules={projector!r})."
            )
        if not (blocks := tower_blocks(name, modules)):
            raise SurgicalError(
                f"{name!r} does not exist in {self.model_name}: its towers are "
                f"{listed(towers_of(self.names)) or 'none, it has one stack'}. Blocks: {listed(self.names)}."
            )
        return blocks

    def _index(self, text: str, stack: str, given: Any) -> tuple[str, ...]:
        layers = self.stacks[stack]
        size = len(layers)
        where = f"{self.model_name}{f' ({stack})' if stack else ''} has {size} repeated blocks, 0 to {size - 1}"
        if SLICE.fullmatch(text):
            start, stop, step = ([int(n) if n else None for n in text.split(":")] + [None])[:3]
            if any(bound is not None and not -size <= bound <= size for bound in (start, stop)) or step == 0:
                raise SurgicalError(f"{given!r} is out of range: {where}. Negative numbers count from the last.")
            if not (chosen := tuple(block for block in layers[start:stop:step] if block in self.names)):
                raise SurgicalError(f"{given!r} selects no block: {where}. The end of a slice is not in it.")
            return chosen
        if not INDEX.fullmatch(text):
            raise SurgicalError(f"{given!r} is not understood: put an index or a slice in the brackets. {where}.")
        if not -size <= int(text) < size:
            raise SurgicalError(f"block {given!r} does not exist: {where}. Negative numbers count from the last: -1.")
        if (block := layers[int(text)]) not in self.names:
            raise SurgicalError(
                f"block {given!r} has no weights of its own: all of them are tied to those of other blocks. Name one "
                f"that holds them: {listed(self.names)}."
            )
        return (block,)

    def _slice_example(self) -> str:
        stack = next(reversed(self.stacks))
        return f"{stack}[-2:]" if stack else "-2:"

    def _stack_names(self) -> str:
        named = " and ".join(f"{stack!r} ({len(layers)} blocks)" for stack, layers in self.stacks.items() if stack)
        return named or "one stack, which has no name: leave it out"


def listed(names: Iterable[str]) -> str:
    """Names for an error message; a long run of numbered blocks is cut in the middle."""
    shown = list(names)
    if len(shown) > 20:
        shown = [*shown[:6], "...", *shown[-6:]]
    return ", ".join(shown)
