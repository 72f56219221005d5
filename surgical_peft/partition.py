"""Cuts a bare model into blocks: finds the repeated layers and places the rest by where it stands relative to them.

No table of model names: a stack is an outermost `nn.ModuleList` whose members share one class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from .wrappers import seen_through, walk


@dataclass(frozen=True)
class Stack:
    """A list of repeated layers.

    Attributes:
        path, size: where it is, and of how many layers.
        label: what tells it from other stacks, e.g. `encoder`; "" for the only one.
        tower: path of the part of the model that is its own, e.g. `model.encoder`; "" for the only one.
    """

    path: str
    size: int
    label: str = ""
    tower: str = ""


def find_stacks(model: nn.Module) -> list[Stack]:
    """Every outermost list of two or more parameter-holding modules of one class."""
    found: list[Stack] = []
    for path, module in walk(model):
        if any(path.startswith(outer.path + ".") for outer in found) or not isinstance(module, nn.ModuleList):
            continue
        classes = {type(seen_through(child)) for child in module}
        if len(module) >= 2 and len(classes) == 1 and all(any(True for _ in child.parameters()) for child in module):
            found.append(Stack(path, len(module)))
    return found if len(found) < 2 else _labelled(found)


def _labelled(stacks: list[Stack]) -> list[Stack]:
    """`model.encoder.block` and `model.decoder.block` become `encoder` and `decoder`."""
    towers = [stack.path.split(".") for stack in stacks]
    while min(map(len, towers)) > 1 and len({parts[-1] for parts in towers}) == 1:
        towers = [parts[:-1] for parts in towers]
    labels = towers
    while min(map(len, labels)) > 1 and len({parts[0] for parts in labels}) == 1:
        labels = [parts[1:] for parts in labels]
    return [
        replace(stack, label=".".join(label), tower=".".join(tower))
        for stack, label, tower in zip(stacks, labels, towers, strict=True)
    ]


def block_owners(model: nn.Module, stacks: list[Stack]) -> tuple[dict[str, str], dict[str, str]]:
    """Block of every largest module (or lone parameter) whose parameters are all of one block; and of tied names."""
    blocks_of: dict[str, str] = {}  # parameter path -> block; tied weights only under their first name
    first_names: dict[int, str] = {}
    again: dict[str, str] = {}  # further name of a tied weight -> its first
    passed: set[str] = set()  # stacks whose layers have been met
    for path, module in walk(model):
        for name, parameter in module.named_parameters(recurse=False):
            full = join(path, name)
            if (first := first_names.setdefault(id(parameter), full)) != full:
                again[full] = first
            elif stack := next((stack for stack in stacks if full.startswith(stack.path + ".")), None):
                blocks_of[full] = join(stack.label, full[len(stack.path) + 1 :].split(".")[0])
                passed.add(stack.path)
            else:
                home = _home(full, stacks)
                after = home.path in passed if home else len(passed) == len(stacks)
                blocks_of[full] = _outside(module, home.label if home else "", after, blocks_of)
    owners: dict[str, str] = {}
    _merge(model, "", blocks_of, owners)
    tied: dict[str, str] = {}
    for path, first in again.items():
        tied[path] = blocks_of[first]
        tied.setdefault(path.rpartition(".")[0], blocks_of[first])
    return owners, tied


def _home(path: str, stacks: list[Stack]) -> Stack | None:
    """The stack in whose tower `path` lies, the innermost; None if it lies in none."""
    homes = [stack for stack in stacks if not stack.tower or path.startswith(stack.tower + ".")]
    return max(homes, key=lambda stack: len(stack.tower), default=None)


def _outside(module: nn.Module, label: str, after: bool, blocks_of: dict[str, str]) -> str:
    """Block of a parameter of `module` that stands before or after the layers; a norm within a head belongs to it.

    Embeddings are embeddings wherever they stand: relative positions (DeBERTa, MPNet) are declared after the layers.
    """
    head = join(label, "head")
    if not after or isinstance(module, nn.Embedding):
        return join(label, "embeddings")
    if "norm" in type(module).__name__.lower() and head not in blocks_of.values():
        return join(label, "final_norm")
    return head


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


def ordered(found: set[str], stacks: list[Stack]) -> tuple[str, ...]:
    """The blocks in the order of execution."""
    order = ["embeddings"]
    for stack in stacks:
        layers = [join(stack.label, str(index)) for index in range(stack.size)]
        around = [join(stack.label, kind) for kind in ("embeddings", "final_norm", "head")] if stack.label else []
        order += [*around[:1], *layers, *around[1:]]
    return tuple(name for name in [*order, "final_norm", "head"] if name in found)


def join(prefix: str, name: str) -> str:
    """`prefix.name`, or `name` if there is no prefix."""
    return f"{prefix}.{name}" if prefix else name


def what_there_is(model: nn.Module) -> str:
    """The parts and module lists of a model that was not understood, for the error message."""
    parts = ", ".join(f"{name} ({type(child).__name__})" for name, child in model.named_children())
    lists = {path: module for path, module in walk(model) if isinstance(module, nn.ModuleList)}
    kinds = {path: ", ".join(dict.fromkeys(type(child).__name__ for child in each)) for path, each in lists.items()}
    found = "; ".join(f"{path} ({len(lists[path])} of {kind or 'nothing'})" for path, kind in kinds.items())
    return f"Its parts are: {parts or 'none'}. Its lists are: {found or 'none'}."
