"""Resolves a config to the modules to tune in a model; refuses misfits before anything is changed."""

from __future__ import annotations

from collections.abc import Collection

from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..blocks.block_map import BlockMap
from ..blocks.given_layers import adapter_configs, as_paths
from ..blocks.module_lists import within
from ..blocks.parts import Layers, Part, whole_or_rows
from ..blocks.unwrap import named_bare_modules
from ..errors import SurgicalError
from .asked_modules import NamedModules
from .config import Choice, SurgicalConfig
from .config import Targets as Asked
from .loading.new_weights import has_new_head, new_head
from .loading.saved_adapter import heads_of
from .moved_buffers import moving_buffers
from .projector import projector_alone
from .target_checks import check_at_hand, check_exchangeable, check_separate
from .tensors.tuned_tensors import Targets, TensorMap, united

PARTS = ("all-norm", "all-bias")


def block_map_for(model: nn.Module, config: SurgicalConfig) -> BlockMap:
    """The map that `config.blocks` is of: by `config.layers`, by those of an adapter in the model, or as it is found.

    Raises:
        SurgicalError: no layers, or others than those of an adapter in the model.
    """
    blocks = BlockMap.from_layers(model, config.layers) if config.layers else BlockMap.find(model)
    for name, other in adapter_configs(model).items():
        if other is config or not isinstance(other, SurgicalConfig) or other.blocks is None:
            continue
        if as_paths(other.layers) != blocks.layer_paths:
            raise SurgicalError(
                f"layers={config.layers!r} cannot join adapter {name!r}, whose blocks are of layers={other.layers!r}: "
                "the blocks of a model are the same for all its adapters. Give both the same layers, or unload the "
                "other one."
            )
    return blocks


def modules_to_tune(
    model: nn.Module, config: SurgicalConfig, blocks: BlockMap | None = None
) -> dict[str, set[str] | None]:
    """Modules that `config` asks to tune in `model`, by path; settles `config.blocks` and `layers` to what they mean.

    Args:
        blocks: the `block_map_for` of both, where it is known.

    Returns:
        for each path the names of the parameters in it that are tuned; None for all of them.

    Raises:
        SurgicalError: blocks that do not exist, `target_modules` that match nothing inside them, an offloaded weight,
            one whose memory another weight uses too, a module of another method's adapter, a layer that forbids to
            set its weights, or a `keep_base` that does not go with what is there. Model and config are left as they
            were.
    """
    if config.blocks == "auto":
        raise SurgicalError(
            "blocks='auto' needs data to choose by: call get_surgical_model(model, config, dataloader), which scores "
            "the blocks and then calls get_peft_model. A Trainer will do in the place of the dataloader, also one of "
            "TRL, made without peft_config: get_surgical_model(trainer.model, config, trainer)."
        )
    names: tuple[str, ...] = ()
    targets: dict[str, set[str] | None] = {}
    tensors = TensorMap.find(model)
    elsewhere: set[str] = set()
    modules = NamedModules(model, config)
    if config.blocks is None:
        # The config has seen to it. PEFT leaves a set in one that it has used: of "all-linear", or of a long list.
        assert not isinstance(config.target_modules, dict | None)
        targets = _chosen(modules, config, config.target_modules, None, "the model")
    else:
        blocks = blocks or block_map_for(model, config)
        asked, within_blocks = projector_alone(blocks, config.blocks, config.target_modules)
        names = blocks.parse(asked)
        for group, choice in _choices(blocks, names, within_blocks):
            inside = [path for name in group for path in blocks.modules[name]]
            for path, found in _chosen(modules, config, choice, inside, f"blocks {list(group)}").items():
                _add(targets, path, found)
        elsewhere = {tensors.first[n] for n, b in blocks.tied.items() if b not in names and n in tensors.first}
    targets = tensors.untied(targets, elsewhere)
    check_separate(model, [path for path in targets if path])
    if config.keep_base == "cpu" and is_deepspeed_zero3_enabled():
        raise SurgicalError(
            "keep_base='cpu' under DeepSpeed's ZeRO-3: the original weights are dealt out over the processes like all "
            "others and cannot be moved one by one. Use 'device', 'none', or DeepSpeed's own offload_param."
        )
    chosen = tensors.chosen(targets)
    check_at_hand(model, list(chosen))
    to_save = _still_to_save(model, config, [path for path in targets if path])
    check_exchangeable(model, tensors, chosen, config)
    if blocks is not None:
        config.blocks, config.layers = list(names), config.layers or list(blocks.layer_paths) or None
        config.target_modules = within_blocks
    config.modules_to_save = to_save or None
    config.tuned_modules = {path: None if tuned is None else sorted(tuned) for path, tuned in targets.items()}
    return targets


def with_modules_besides(
    model: nn.Module,
    config: SurgicalConfig,
    targets: Targets,
    new: Collection[str],
    moving: bool,
    saved: Collection[str] | None = None,
) -> Targets:
    """All modules of the adapter, those asked for and others; records them in `config.tuned_modules`.

    The others are the layers of a new head that PEFT does not know by their names, what else is new beside it, and the
    buffers of frozen modules that move in training.

    Args:
        targets: from `modules_to_tune`, which has settled `config`.
        new: names of the weights that are newly initialized.
        moving: whether frozen modules are in train mode, too.
        saved: of a saved adapter, today's names of the weights that it says are its own. The others are not asked of
            it, and neither the base nor who trains it on decides what it holds.
    """
    tensors = TensorMap.find(model)
    found: dict[str, Collection[str] | None]
    found = {} if saved is not None else {**_rest_of_new_head(model, config, targets, tensors)}
    chosen = tensors.chosen(united(targets, found))
    heads = heads_of(config, (path for path, _ in named_bare_modules(model)))
    others = [name for name in (new if saved is None else saved) if name not in chosen and not within(name, heads)]
    if saved is not None:
        found = _by_module(tensors, others)
    elif has_new_head(config):
        found = united(found, _by_module(tensors, others))
    if moving and saved is None:
        found = united(found, moving_buffers(model, tensors.chosen(united(targets, found))))
    check_exchangeable(model, tensors, tensors.chosen(found), config)
    every = united(targets, found)
    config.tuned_modules = {path: None if names is None else sorted(names) for path, names in every.items()}
    return every


def _add(targets: dict[str, set[str] | None], path: str, names: set[str] | None) -> None:
    """Parameters that no module has to itself come one by one, under the module that they are of."""
    before = targets.get(path, set())
    targets[path] = None if names is None or before is None else before | names


def _choices(blocks: BlockMap, names: tuple[str, ...], target_modules: Asked) -> list[tuple[tuple[str, ...], Choice]]:
    """The choice for each group of blocks: one for all, or one for each key of a dictionary."""
    if not isinstance(target_modules, dict):
        return [(names, target_modules or "all")]
    groups = [(blocks.parse(key), choice) for key, choice in target_modules.items()]
    keys = [name for group, _ in groups for name in group]
    for name in keys:
        if keys.count(name) > 1 or name not in names:
            reason = "is there twice" if keys.count(name) > 1 else f"is not among blocks={list(names)}"
            raise SurgicalError(f"target_modules={target_modules!r}: block {name!r} {reason}. Say each block once.")
    for name in names:
        if name not in keys:
            raise SurgicalError(
                f"target_modules={target_modules!r} says nothing about block {name!r}, which is among blocks="
                f"{list(names)}: add {name!r}: 'all', or leave blocks out; the keys are the blocks then."
            )
    return groups


def _chosen(
    modules: NamedModules, config: SurgicalConfig, choice: Choice, inside: list[str] | None, where: str
) -> dict[str, set[str] | None]:
    """The largest modules that `choice` means within the paths `inside`, and the parameters of them."""
    choice, rows = _without_parts(modules, config, choice, inside, where)
    parts = choice if choice in PARTS else None
    if parts and inside is None:
        raise SurgicalError(
            f"target_modules={choice!r} chooses among the parameters of blocks: say which; blocks='all' is everywhere."
        )
    everything = choice == "all" and inside is not None
    targets = modules.outermost(".*" if parts or everything else choice, inside) if choice else {}
    if everything or parts == "all-bias":
        for path in inside or ():
            if path in modules.by_path:
                continue  # others are parameters that no module has to itself
            parent, _, name = path.rpartition(".")
            _add(targets, parent, {name})
    if parts:
        asked = {path: _parameters_of(modules.by_path[path], parts, names) for path, names in targets.items()}
        targets = {path: names for path, names in asked.items() if names}
    targets = whole_or_rows(targets, rows)
    if not targets:
        raise SurgicalError(
            f"target_modules={choice!r} with exclude_modules={config.exclude_modules!r} match no "
            f"module with parameters in {where}. Names inside: {modules.some_names(inside)}."
        )
    return targets


def _without_parts(
    modules: NamedModules, config: SurgicalConfig, choice: Choice, inside: list[str] | None, where: str
) -> tuple[Choice, dict[str, set[str] | None]]:
    """The choice with paths in the place of names of parts, such as `attention` or `router`; and single experts.

    A name that modules have themselves stands for these. Every name has to match in the model, but of saved adapters,
    whose file says what they hold.
    """
    names = [choice] if isinstance(choice, str) else list(choice)
    if isinstance(choice, str) and (choice in (*PARTS, "all") or not Part.is_one(choice)):
        return choice, {}
    unknown = [name for name in names if not modules.outermost([name], inside)]
    known = config.tuned_modules if config.read_from is not None else None
    parts = {name: Part.read(name) for name in unknown if Part.is_one(name)}
    if inside is None and parts:
        raise SurgicalError(
            f"target_modules={choice!r}: {next(iter(parts))!r} is a part of layers: say of which blocks; "
            "blocks='all' is everywhere."
        )
    if not unknown:
        return names, {}
    layers = Layers({path: modules.by_path[path] for path in modules.inside(inside)}, frozenset(inside or ()))
    paths: list[str] = []
    rows: dict[str, set[str] | None] = {}
    for name in unknown:
        found = layers.find(part, name) if (part := parts.get(name)) else {}
        if not found and known is None and not modules.outermost([name], None):
            raise SurgicalError(
                f"target_modules={choice!r}: {name!r} matches no module with parameters in {where}. Parts: "
                f"{', '.join(layers.existing()) or 'none'}. Names inside: {modules.some_names(inside)}."
            )
        for path, attributes in found.items():
            if known is not None and not within(path, known):
                continue  # saved by a version that knew the name of no part
            if attributes is None:
                paths.append(path)
            else:
                rows[path] = (rows.get(path) or set()) | attributes
    return sorted({*paths, *(name for name in names if name not in unknown)}), rows


def _parameters_of(module: nn.Module, parts: str, among: set[str] | None) -> set[str]:
    """Names of the biases, or of the parameters of normalization layers (known by class), in `module`."""
    names: set[str] = set()
    for path, child in named_bare_modules(module):
        for name, _ in child.named_parameters(recurse=False):
            if name.endswith("bias") if parts == "all-bias" else "norm" in type(child).__name__.lower():
                names.add(f"{path}.{name}" if path else name)
    return names if among is None else names & among


def _still_to_save(model: nn.Module, config: SurgicalConfig, targets: list[str]) -> list[str]:
    """`modules_to_save` without what is tuned anyway (PEFT adds the head of a SEQ_CLS model by itself)."""
    rest: list[str] = []
    for name in dict.fromkeys(config.modules_to_save or []):  # PEFT adds the same ones at every load
        # PEFT's rule: no dot is needed
        matches = [path for path, _ in named_bare_modules(model) if path.endswith(name)]
        others = [path for path in matches if path not in targets]
        overlap = [path for path in others if within(path, targets) or any(within(t, [path]) for t in targets)]
        if overlap or 0 < len(others) < len(matches):
            raise SurgicalError(
                f"modules_to_save={name!r} names {(overlap or others)[0]}, but blocks and target_modules already tune "
                "all, part or one of its kind: leave it out of modules_to_save, or give its full path."
            )
        if not matches and config.task_type is None:  # with a task type, PEFT lists every name a head may have
            raise SurgicalError(
                f"modules_to_save={name!r} matches no module of {type(model).__name__}. "
                f"Names: {NamedModules(model, config).some_names(None)}."
            )
        check_separate(model, others, ModulesToSaveWrapper)
        if others or not matches:
            rest.append(name)
    return rest


def _rest_of_new_head(
    model: nn.Module, config: SurgicalConfig, targets: Targets, tensors: TensorMap
) -> dict[str, set[str] | None]:
    """Modules beside the body that a model shares with other tasks, which PEFT does not save by name.

    DeBERTa's pooler, for one: it is as new as the classifier behind it, and random in every process.
    """
    paths = [path for path in new_head(model, config) if tensors.parameters(path)]
    taken = [path for path in paths if any(path.endswith(name) for name in config.modules_to_save or [])]
    rest = [path for path in paths if path not in taken and not any(within(t, [path]) for t in targets)]
    elsewhere = {name for name in tensors.places if not within(name, rest)}
    return tensors.untied(dict.fromkeys(rest), elsewhere)


def _by_module(tensors: TensorMap, names: Collection[str]) -> dict[str, Collection[str] | None]:
    paths = [name.rpartition(".")[::2] for name in sorted(names)]
    is_parameter = [tensors.at(name)[0].is_parameter for name in sorted(names)]
    return united(*({path: [name] if asked else []} for (path, name), asked in zip(paths, is_parameter, strict=True)))
