"""Chooses the lists of a bare model that are its repeated layers, and names and orders them as stacks.

Lists with attention count, and those without that are the bulk of their model, as in convolutional and state-space
models. So the mergers, necks and upsamplers beside a transformer do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from .module_lists import Contents, ModuleRow, contents_of, is_a, is_list, is_norm, join, members_of, rows_of
from .unwrap import named_bare_modules, unwrap_module

# Share of the weights in all lists of a model that one without attention must hold: if another has attention, if none.
_BULK, _SHARE = 0.5, 0.1


@dataclass(frozen=True)
class Stack:
    """Layers that run one after the other.

    Attributes:
        label: its name among the stacks, e.g. `encoder`, `stages.2`; "" for the only one.
        layers: for each layer the paths of its modules, almost always one.
        path: of the list.
        homes: the parts of the model that it lies in and shares with few others, outermost first: path -> label.
        around: paths of what lies beside the layers of a stage, and the block that each belongs to.
    """

    label: str
    layers: tuple[tuple[str, ...], ...]
    path: str
    homes: dict[str, str] = field(default_factory=dict)
    around: dict[str, str] = field(default_factory=dict)


def find_stacks(model: nn.Module) -> list[Stack]:
    """The stacks of the model, in the order of execution; none if no list is evidently one of layers."""
    contents = contents_of(model)
    lists = list(rows_of(model, contents))
    chosen = _layer_lists([row for row in lists if row.is_stages or row.is_layers])
    chosen += _alike(model, contents, chosen)
    merged = {parts[0].path: parts for parts in (_parts_of_layers(row, lists) for row in chosen)}
    shared = shared_depth(list(merged))
    towers = stack_labels(list(merged), shared)
    stacks: list[Stack] = []
    for path in _in_order(towers):
        parts, tower = merged[path], towers[path]
        if parts[0].is_stages:
            inside = _stages(parts[0], tower, _beside(parts[0], lists))
        else:
            inside = [Stack(tower, tuple(zip(*(part.members for part in parts), strict=True)), path)]
        stacks += [replace(stack, homes=homes_of(path, tower, shared)) for stack in inside]
    return stacks


def homes_of(path: str, tower: str, shared: int) -> dict[str, str]:
    """The parts of the model between what all stacks share and the list, by path: their labels."""
    parts, labels = path.split("."), tower.split(".") if tower else []
    ends = [n for n in range(1, len(labels) + 1) if shared + n < len(parts)]
    return {".".join(parts[: shared + n]): ".".join(labels[:n]) for n in ends}


def _layer_lists(candidates: list[ModuleRow]) -> list[ModuleRow]:
    """The candidates with attention, and those without that hold the bulk of the lists of their model.

    Beside attention only stages count, i.e. a convolutional backbone: in a tiny model the mergers may be the bulk.
    """
    chosen = []
    for row in candidates:
        rivals = [other for other in candidates if not row.scope or other.path.startswith(row.scope + ".")]
        attended = any(rival.attends for rival in rivals)
        needed = _BULK if attended or len(row.members) == 1 else _SHARE
        bulk = row.size >= needed * sum(rival.size for rival in rivals)
        if row.attends or (bulk and (row.is_stages or not attended)):
            chosen.append(row)
    return chosen


def _alike(model: nn.Module, contents: Mapping[nn.Module, Contents], chosen: list[ModuleRow]) -> list[ModuleRow]:
    """The outermost lists of one class in models that have no other; in a part of a model, if they are most of it."""
    rows: list[ModuleRow] = []
    scopes = {
        path: module for path, module in named_bare_modules(model) if not path or is_a(module, "PreTrainedModel")
    }
    for path, module in named_bare_modules(model):
        if not is_list(module) or any(path.startswith(outer.path + ".") for outer in rows):
            continue
        scope = max((scope for scope in scopes if not scope or path.startswith(scope + ".")), key=len)
        if any(not scope or other.path.startswith(scope + ".") for other in chosen):
            continue
        members = members_of(module, path, contents)
        alike = len({type(child) for child in members.values()}) == 1 and 1 < len(members) == len(module._modules)
        row = ModuleRow(path, members, scope, False, contents)
        if alike and (not scope or 2 * row.size >= contents[scopes[scope]].size):
            rows.append(row)
    return rows


def _parts_of_layers(row: ModuleRow, lists: list[ModuleRow]) -> list[ModuleRow]:
    """A list of nothing but attention holds part of each layer (XLM): the lists beside it hold the other parts."""
    beside = _beside(row, lists)
    alone = [all(type(member).__name__.endswith("Attention") for member in part.members.values()) for part in beside]
    return beside if any(alone) and not row.is_stages else [row]


def _beside(row: ModuleRow, lists: list[ModuleRow]) -> list[ModuleRow]:
    """The lists of as many members in the same module, `row` among them, in the order of declaration."""
    parent, number = row.path.rpartition(".")[0], len(row.members)
    return [other for other in lists if other.path.rpartition(".")[0] == parent and len(other.members) == number]


def _stages(row: ModuleRow, tower: str, beside: list[ModuleRow]) -> list[Stack]:
    """A stack for each stage.

    Modules between the layers of two stages are the `embeddings` of the second; after the last, they join its layer.
    """
    stacks: list[Stack] = []
    waiting: list[str] = []  # paths that belong to the embeddings of the next stage
    for number, (path, member) in enumerate(row.members.items()):
        if path not in row.inner:
            waiting.append(path)
            continue
        inner, label = row.inner[path], join(tower, f"stages.{len(stacks)}")
        around = dict.fromkeys(waiting, join(label, "embeddings"))
        waiting = []
        ahead = True
        for part, module in _parts(member, path, inner.path, row.contents):
            if part == inner.path:
                ahead = False
            elif ahead:
                around[part] = join(label, "embeddings")
            elif is_norm(module):
                around[part] = join(label, "final_norm")
            else:
                waiting.append(part)
        for other in beside:
            if other is not row:
                part, module = list(other.members.items())[number]
                around[part] = join(label, "final_norm" if is_norm(module) else "embeddings")
        stacks.append(Stack(label, tuple((layer,) for layer in inner.members), row.path, around=around))
    if stacks:
        stacks[-1].around.update(dict.fromkeys(waiting, join(stacks[-1].label, str(len(stacks[-1].layers) - 1))))
    return stacks


def _parts(
    module: nn.Module, path: str, inside: str, contents: Mapping[nn.Module, Contents]
) -> Iterator[tuple[str, nn.Module]]:
    """The parameters and modules of `module` in order, opened up as far as the list at `inside` asks for."""
    module = unwrap_module(module)
    if path == inside:
        yield path, module
        return
    for name, _ in module.named_parameters(recurse=False):
        yield join(path, name), module
    for name, child in members_of(module, path, contents).items():
        if name == inside or inside.startswith(name + "."):
            yield from _parts(child, name, inside, contents)
        else:
            yield name, child


def shared_depth(paths: list[str]) -> int:
    """Number of parts that all paths begin with."""
    split = [path.split(".")[:-1] for path in paths]
    differ = (n for n, parts in enumerate(zip(*split, strict=False)) if len(set(parts)) > 1)
    return next(differ, min(map(len, split), default=0))


def stack_labels(paths: list[str], shared: int) -> dict[str, str]:
    """`model.encoder.block` and `model.decoder.block` become `encoder` and `decoder`: the shortest that are unique."""
    split = {path: path.split(".")[shared:] for path in paths if len(paths) > 1}
    labels = dict.fromkeys(paths, "")
    for path, parts in split.items():
        others = [other for other in split.values() if other is not parts]
        lengths = (n for n in range(1, len(parts)) if not any(other[:n] == parts[:n] for other in others))
        labels[path] = ".".join(parts[: next(lengths, len(parts))])
    return labels


def _in_order(towers: dict[str, str]) -> list[str]:
    """As declared, but a decoder, a language model and layers that lie in no tower run after what feeds them."""

    def position(path: str) -> list[tuple[bool, int]]:
        parts = towers[path].split(".")
        prefixes = [".".join(parts[: n + 1]) for n in range(len(parts))]
        labels = list(towers.values())
        first = [next(n for n, other in enumerate(labels) if f"{other}.".startswith(f"{part}.")) for part in prefixes]
        last = [part in ("decoder", "language_model") for part in parts]
        last[-1] = last[-1] or path.endswith(towers[path])
        return list(zip(last, first, strict=True))

    return sorted(towers, key=position)
