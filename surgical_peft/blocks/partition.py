"""Cuts a bare model into blocks: the layers of its stacks, and the rest by where it stands relative to them."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from .layer_stacks import Stack
from .module_lists import is_norm, join, parents
from .unwrap import named_bare_modules, named_children, unwrap_module

# Parts run in the order of declaration, but for these names. LFM2's `embedding_norm` is its last norm.
_EMBEDDING_CLASS = re.compile(r"(Embed|Embedder|Embeddings?)$")
_EMBEDDING = re.compile(r"^(embed(?!_out)|pos(ition)?_embed|per_layer)|norm_embed|embed.*(layer_?norm|ln)$|post_conv")
_LAST_NORM = re.compile(r"final|post|_f$")
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def block_owners(model: nn.Module, stacks: list[Stack]) -> tuple[dict[str, str], dict[str, str]]:
    """Block of every largest module (or lone parameter) whose parameters are all of one block; and of tied names."""
    layers = {path: (stack, index) for stack in stacks for index, layer in enumerate(stack.layers) for path in layer}
    places = {path: join(stack.label, str(index)) for path, (stack, index) in layers.items()}
    for stack in stacks:
        places |= stack.around
    blocks_of: dict[str, str] = {}  # parameter path -> block; tied weights only under their first name
    first_names: dict[int, str] = {}
    again: dict[str, str] = {}  # further name of a tied weight -> its first
    passed: set[str] = set()  # labels of stacks whose layers have been met
    embeddings: set[str] = set()  # paths of modules that are embeddings by their class
    modules = dict(named_bare_modules(model))
    for path, module in modules.items():
        if path and _EMBEDDING_CLASS.search(type(module).__name__):
            embeddings.add(path)
        for name, parameter in module.named_parameters(recurse=False):
            full = join(path, name)
            if (first := first_names.setdefault(id(parameter), full)) != full:
                again[full] = first
            elif holder := _above(full, places):
                blocks_of[full] = places[holder]
                passed |= {layers[holder][0].label} if holder in layers else set()
            else:
                home, tower = _home(full, stacks)
                parts = full[len(home) + 1 if home else 0 :].split(".")
                before = bool(_above(full, embeddings)) or any(map(_EMBEDDING.search, parts))
                after = not before and (_follows(home, stacks, passed) or _runs_last(path, modules, stacks))
                blocks_of[full] = _outside(module, tower, after, blocks_of)
    inside: dict[str, set[str]] = {"": set(blocks_of.values())}  # module -> blocks of the parameters in it
    for full, block in blocks_of.items():
        for path in parents(full):
            inside.setdefault(path, set()).add(block)
    owners: dict[str, str] = {}
    _merge(model, "", blocks_of, inside, owners)
    tied: dict[str, str] = {}
    for path, first in again.items():
        tied[path] = blocks_of[first]
        module_path = path.rpartition(".")[0]
        if module_path not in inside:  # XLM's head has a bias of its own
            tied.setdefault(module_path, blocks_of[first])
    return owners, tied


def _above(path: str, known: Collection[str]) -> str:
    """The longest of the known paths that `path` is or lies in; "" if there is none."""
    while path and path not in known:
        path = path.rpartition(".")[0]
    return path


def _home(path: str, stacks: list[Stack]) -> tuple[str, str]:
    """Path and label of the smallest tower, or part of the model with several towers, that `path` lies in."""
    homes = {home: label for stack in stacks for home, label in stack.homes.items()}
    home = _above(path, homes)
    return home, homes.get(home, "")


def _follows(home: str, stacks: list[Stack], passed: set[str]) -> bool:
    """True if the layers at `home` itself have been passed or, where it has none, those of all towers in it."""
    inside = [stack for stack in stacks if not home or home in stack.homes]
    direct = [stack for stack in inside if next(reversed(stack.homes), "") == home]
    return {stack.label for stack in direct or inside} <= passed


def _runs_last(path: str, modules: dict[str, nn.Module], stacks: list[Stack]) -> bool:
    """True for a norm declared before the layers that runs after them: OPT's `final_layer_norm`, T5Gemma's `norm`.

    Wav2Vec2's runs before them in one class of encoder and after them in another.
    """
    parent, _, name = path.rpartition(".")
    beside = any(stack.path.rpartition(".")[0] == parent for stack in stacks)
    called_last = name in ("norm", "layernorm") or type(modules[parent]).__name__.endswith("StableLayerNorm")
    return is_norm(modules[path]) and (bool(_LAST_NORM.search(name)) or (beside and called_last))


def _outside(module: nn.Module, tower: str, after: bool, blocks_of: dict[str, str]) -> str:
    """Block of a parameter of `module` that runs before or after the layers; a norm within a head belongs to it."""
    head = join(tower, "head")
    if not after:
        return join(tower, "embeddings")
    return join(tower, "final_norm") if is_norm(module) and head not in blocks_of.values() else head


def _merge(
    module: nn.Module, path: str, blocks_of: dict[str, str], inside: dict[str, set[str]], owners: dict[str, str]
) -> None:
    prefix = path + "." if path else ""
    blocks = inside.get(path, ())
    if len(blocks) == 1 and path and not isinstance(module, nn.ModuleList | nn.ModuleDict):
        owners[path] = next(iter(blocks))
    elif blocks:
        module = unwrap_module(module)
        for name, _ in module.named_parameters(recurse=False):
            if prefix + name in blocks_of:
                owners[prefix + name] = blocks_of[prefix + name]
        for name, child in named_children(module):
            _merge(child, prefix + name, blocks_of, inside, owners)


def ordered(names: set[str], stacks: list[Stack]) -> tuple[str, ...]:
    """The blocks in the order of execution."""
    order: list[str] = []
    open_: list[str] = []  # labels of the enclosing towers, outermost first

    def leave(towers: list[str]) -> None:
        while open_ and open_[-1] not in towers:
            tower = open_.pop()
            order.extend(join(tower, kind) for kind in ("final_norm", "head"))

    for stack in stacks:
        towers = ["", *stack.homes.values()]
        leave(towers)
        for tower in towers[len(open_) :]:
            open_.append(tower)
            order.append(join(tower, "embeddings"))
        layers = [str(index) for index in range(len(stack.layers))]
        order += [join(stack.label, name) for name in ("embeddings", *layers, "final_norm", "head")]
    leave([])
    return tuple(dict.fromkeys(name for name in order if name in names))


def describe_structure(model: nn.Module) -> str:
    """The parts and lists of a model that was not understood, for the error message."""
    parts = ", ".join(f"{name} ({type(child).__name__})" for name, child in named_children(model))
    lists = {path: module for path, module in named_bare_modules(model) if path and isinstance(module, _LISTS)}
    described = "; ".join(
        f"{path} ({len(module._modules)} of {', '.join({type(part).__name__: None for part in module.children()})})"
        if module._modules
        else f"{path} (empty)"
        for path, module in lists.items()
    )
    return f"Its parts are: {parts or 'none'}. Its lists are: {described or 'none'}."
