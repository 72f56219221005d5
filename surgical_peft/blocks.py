"""The block map: which parameters form `embeddings`, each repeated layer, `final_norm` and `head`.

No table of model names: the repeated layers are the outermost `nn.ModuleList`s whose members share one class, and
the rest is placed by where it stands relative to them. Everything else in the package asks this map; nobody else
parses parameter names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from .errors import SurgicalError

# What containers put in front of, or into, a parameter's name: DDP, torch.compile, FSDP1, PeftModel.
_CONTAINERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PEFT_PREFIX = re.compile(r"^base_model\.model\.")
_STACK_INDEX = re.compile(r"(?P<stack>[^\[\]]+)\[(?P<index>[^\[\]]*)\]")
_SLICE = re.compile(r"-?\d*:-?\d*(?::-?\d+)?")


def clean_name(name: str) -> str:
    """A parameter's name without what DDP, FSDP, `torch.compile` and `PeftModel` put around it.

    Example:
        >>> clean_name("module._orig_mod.base_model.model.vit.layers.1.mlp.fc1.weight")
        'vit.layers.1.mlp.fc1.weight'
    """
    return _PEFT_PREFIX.sub("", _CONTAINERS.sub("", name))


@dataclass(frozen=True)
class BlockMap:
    """Which block each parameter of a model belongs to: a partition, in the order of execution.

    Attributes:
        names: block names, e.g. `("embeddings", "0", ..., "11", "final_norm", "head")`. With two or more stacks the
            repeated layers carry their stack: `("embeddings", "encoder.0", ..., "decoder.0", ..., "head")`.
        modules: for each block the paths of the largest modules that hold exactly its parameters, as in the bare
            model (no PEFT containers). A path that names a parameter stands for one that no such module holds.
        stacks: for each stack (`""` when there is only one) its block names, first layer first.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> BlockMap.find(ViTModel(ViTConfig(num_hidden_layers=2), add_pooling_layer=False)).names
        ('embeddings', '0', '1', 'final_norm')
    """

    names: tuple[str, ...]
    modules: dict[str, tuple[str, ...]]
    stacks: dict[str, tuple[str, ...]]
    model_name: str

    @classmethod
    def find(cls, model: nn.Module) -> BlockMap:
        """Read the block map off `model`, bare or wrapped by PEFT, DDP, FSDP or `torch.compile`.

        Raises:
            SurgicalError: no list of repeated layers was found; the message lists what was.
        """
        bare = _bare(model)
        lists = _repeated_lists(bare)
        if not lists:
            children = ", ".join(f"{name} ({type(child).__name__})" for name, child in bare.named_children())
            raise SurgicalError(
                f"no repeated blocks found in {type(bare).__name__}: it has no nn.ModuleList of two or more modules of "
                f"one class. Its parts are: {children or 'none'}. Choose modules by name instead: "
                "SurgicalConfig(target_modules=[...])."
            )
        labels = _stack_labels([path for path, _ in lists])
        owners = _block_owners(bare, lists, labels)
        names = _ordered(set(owners.values()), labels, [size for _, size in lists])
        stacks = {
            label: tuple(_join(label, str(index)) for index in range(size))
            for label, (_, size) in zip(labels, lists, strict=True)
        }
        modules = {block: tuple(path for path, owner in owners.items() if owner == block) for block in names}
        return cls(names=names, modules=modules, stacks=stacks, model_name=type(bare).__name__)

    def block_of(self, name: str) -> str:
        """The block that a parameter or module name belongs to; containers in the name are ignored.

        Raises:
            SurgicalError: the name lies in no block.

        Example:
            >>> blocks.block_of("vit.layers.3.attention.q_proj.weight")
            '3'
        """
        path = clean_name(name)
        while path:
            if path in self._owners:
                return self._owners[path]
            path = path.rpartition(".")[0]
        raise SurgicalError(f"{name!r} belongs to no block of {self.model_name}. Blocks: {_listed(self.names)}.")

    @cached_property
    def _owners(self) -> dict[str, str]:
        return {path: block for block, paths in self.modules.items() for path in paths}

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
            SurgicalError: unknown name, index out of range, the same block twice, nothing selected, or an index
                without a stack where the model has several.

        Example:
            >>> blocks.parse([0, -1, "head"])
            ('0', '11', 'head')
        """
        parts = [spec] if isinstance(spec, int | str) else list(spec)
        chosen: list[str] = []
        for part in parts:
            for block in self._parse_one(part):
                if block in chosen:
                    raise SurgicalError(f"block {block!r} is named twice in {spec!r}: name it once.")
                chosen.append(block)
        if not chosen:
            raise SurgicalError(f"{spec!r} selects no block. Choose at least one of: {_listed(self.names)}.")
        return tuple(block for block in self.names if block in chosen)

    def _parse_one(self, part: Any) -> tuple[str, ...]:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise SurgicalError(
                f"{part!r} is not a block: give an index, a slice such as '0:3', or a name. Blocks: {_listed(self.names)}."
            )
        if part == "all":
            return self.names
        if part in self.names:
            return (str(part),)
        if isinstance(part, str) and (match := _STACK_INDEX.fullmatch(part)):
            stack, inner = match["stack"], match["index"].strip()
            if stack not in self.stacks or stack == "":
                raise SurgicalError(f"{part!r}: {self.model_name} has no stack {stack!r}. Stacks: {self._stack_names()}.")
            return self._index(inner, stack, part)
        if isinstance(part, int) or re.fullmatch(r"-?\d+", part) or _SLICE.fullmatch(part):
            if len(self.stacks) > 1:
                example = f"{list(self.stacks)[-1]}[{part}]"
                raise SurgicalError(
                    f"{part!r} does not say which stack: {self.model_name} has {self._stack_names()}. "
                    f"Name one, for example {example!r}."
                )
            return self._index(str(part), next(iter(self.stacks)), part)
        raise SurgicalError(
            f"block {part!r} does not exist in {self.model_name}. Blocks: {_listed(self.names)}; "
            "indices, slices such as '-2:', and 'all' are understood too."
        )

    def _index(self, text: str, stack: str, given: Any) -> tuple[str, ...]:
        blocks = self.stacks[stack]
        size = len(blocks)
        where = f"{self.model_name}{f' ({stack})' if stack else ''} has {size} repeated blocks, 0 to {size - 1}"
        if text == "all":
            return blocks
        if _SLICE.fullmatch(text):
            start, stop, step = ([int(n) if n else None for n in text.split(":")] + [None])[:3]
            if any(bound is not None and not -size <= bound <= size for bound in (start, stop)) or step == 0:
                raise SurgicalError(f"{given!r} is out of range: {where}. Negative numbers count from the last.")
            return blocks[start:stop:step]
        if not re.fullmatch(r"-?\d+", text):
            raise SurgicalError(f"{given!r} is not understood: put an index or a slice in the brackets. {where}.")
        if not -size <= int(text) < size:
            raise SurgicalError(f"block {given!r} does not exist: {where}. Negative numbers count from the last: -1.")
        return (blocks[int(text)],)

    def _stack_names(self) -> str:
        return " and ".join(f"{stack!r} ({len(blocks)} blocks)" for stack, blocks in self.stacks.items() if stack) or "one"


def seen_through(module: nn.Module) -> nn.Module:
    """The module that a PEFT wrapper stands for: its `base_layer` or `original_module`, else the module itself."""
    while (inner := module._modules.get("base_layer") or module._modules.get("original_module")) is not None:
        module = inner
    return module


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the bare model: PEFT's wrappers are seen through, so paths carry no container."""
    module = seen_through(module)
    yield path, module
    for name, child in module.named_children():
        yield from walk(child, _join(path, name))


def idle_parameters(model: nn.Module) -> set[int]:
    """`id`s of the parameters that PEFT keeps beside those in use: wrapped originals and copies of inactive adapters."""
    idle: set[int] = set()
    for module in model.modules():
        copies = module._modules.get("surgical_copies") or module._modules.get("modules_to_save")
        if isinstance(copies, nn.ModuleDict):
            wrapper: Any = module
            active = [] if wrapper.disable_adapters else [name for name in wrapper.active_adapters if name in copies]
            used = copies[active[0]] if active else seen_through(module)
            ids = {id(parameter) for parameter in used.parameters()}
            idle |= {id(parameter) for parameter in module.parameters()} - ids
    return idle


def _bare(model: nn.Module) -> nn.Module:
    while True:
        inner = next((model._modules[n] for n in ("module", "_orig_mod", "_fsdp_wrapped_module") if n in model._modules), None)
        if inner is None and "base_model" in model._modules and "model" in model._modules["base_model"]._modules:  # type: ignore[union-attr]
            inner = model._modules["base_model"].model  # type: ignore[union-attr]
        if inner is None:
            return model
        model = inner


def _repeated_lists(model: nn.Module) -> list[tuple[str, int]]:
    """Path and length of every outermost list of two or more parameter-holding modules of one class."""
    found: list[tuple[str, int]] = []
    for path, module in walk(model):
        if any(path.startswith(outer + ".") for outer, _ in found) or not isinstance(module, nn.ModuleList):
            continue
        classes = {type(seen_through(child)) for child in module}
        if len(module) >= 2 and len(classes) == 1 and all(any(True for _ in child.parameters()) for child in module):
            found.append((path, len(module)))
    return found


def _stack_labels(paths: list[str]) -> list[str]:
    """What tells the lists apart: `encoder.block` and `decoder.block` become `encoder` and `decoder`; one list, ''."""
    if len(paths) == 1:
        return [""]
    split = [path.split(".") for path in paths]
    while min(map(len, split)) > 1 and len({parts[-1] for parts in split}) == 1:
        split = [parts[:-1] for parts in split]
    while min(map(len, split)) > 1 and len({parts[0] for parts in split}) == 1:
        split = [parts[1:] for parts in split]
    return [".".join(parts) for parts in split]


def _block_owners(model: nn.Module, lists: list[tuple[str, int]], labels: list[str]) -> dict[str, str]:
    """Block of every largest module (or lone parameter) whose parameters all belong to one block."""
    blocks_of: dict[str, str] = {}  # parameter path -> block; tied weights only under their first name
    seen: set[int] = set()
    parameters = []
    for path, module in walk(model):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                parameters.append((_join(path, name), module))
    passed: list[int] = []  # lists whose layers have been met, in order
    for path, module in parameters:
        index = next((i for i, (stack, _) in enumerate(lists) if path.startswith(stack + ".")), None)
        if index is not None:
            stack = lists[index][0]
            blocks_of[path] = _join(labels[index], path[len(stack) + 1 :].split(".")[0])
            if index not in passed:
                passed.append(index)
            continue
        home = _home_stack(path, lists, labels)
        after = home in passed if home is not None else len(passed) == len(lists)
        kind = "embeddings" if not after else "final_norm" if "norm" in type(module).__name__.lower() else "head"
        blocks_of[path] = _join(labels[home] if home is not None and len(lists) > 1 else "", kind)
    owners: dict[str, str] = {}
    _merge(model, "", blocks_of, owners)
    return owners


def _home_stack(path: str, lists: list[tuple[str, int]], labels: list[str]) -> int | None:
    """The stack whose own tower (`encoder`, `vision_model`) holds `path`; None where there is one stack or no tower."""
    if len(lists) == 1:
        return 0
    for index, ((stack, _), label) in enumerate(zip(lists, labels, strict=True)):
        tower = stack[: stack.rfind(label) + len(label)]
        if path.startswith(tower + "."):
            return index
    return None


def _merge(module: nn.Module, path: str, blocks_of: dict[str, str], owners: dict[str, str]) -> None:
    prefix = path + "." if path else ""
    blocks = {block for parameter, block in blocks_of.items() if parameter.startswith(prefix)}
    if len(blocks) == 1 and path and not isinstance(module, nn.ModuleList | nn.ModuleDict):
        owners[path] = blocks.pop()
    elif blocks:
        module = seen_through(module)
        for name, _ in module.named_parameters(recurse=False):
            if prefix + name in blocks_of:
                owners[prefix + name] = blocks_of[prefix + name]
        for name, child in module.named_children():
            _merge(child, prefix + name, blocks_of, owners)


def _ordered(found: set[str], labels: list[str], sizes: list[int]) -> tuple[str, ...]:
    order = ["embeddings"]
    for label, size in zip(labels, sizes, strict=True):
        kinds = ["embeddings", *map(str, range(size)), "final_norm", "head"]
        order += [_join(label, kind) for kind in kinds] if label else kinds[1:-2]
    return tuple(name for name in [*order, "final_norm", "head"] if name in found)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _listed(names: Iterable[str]) -> str:
    """Names for an error message; a long run of numbered blocks is cut in the middle."""
    shown = list(names)
    if len(shown) > 20:
        shown = [*shown[:6], "...", *shown[-6:]]
    return ", ".join(shown)
