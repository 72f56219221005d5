"""Which modules a config asks to tune in a model, and all that is refused before anything is changed."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .blocks import BlockMap
from .config import Choice, SurgicalConfig, Targets
from .errors import SurgicalError
from .layer import SurgicalLayer
from .offloading import lent_weights
from .wrappers import walk

PARTS = ("all-norm", "all-bias")
_WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def modules_to_tune(model: nn.Module, config: SurgicalConfig) -> dict[str, set[str] | None]:
    """Which modules `config` asks to tune in `model`, by path; settles `config.blocks` to the final block names.

    Returns:
        for each path the names of the parameters in it that are tuned; None for all of them.

    Raises:
        SurgicalError: blocks that do not exist, `target_modules` that match nothing inside them, a tied or offloaded
            weight, a module already tuned, as part or as whole, by another adapter, or a `keep_base` that does not go
            with what is there. Model and config are left as they were.
    """
    if config.blocks == "auto":
        raise SurgicalError(
            "blocks='auto' needs data to choose by: call get_surgical_model(model, config, dataloader), which scores "
            "the blocks and then calls get_peft_model."
        )
    names: tuple[str, ...] = ()
    targets: dict[str, set[str] | None] = {}
    if config.blocks is None:
        # The config has seen to it. PEFT leaves a set in one that it has used: of "all-linear", or of a long list.
        assert not isinstance(config.target_modules, dict | None)
        targets = _chosen(model, config, config.target_modules, None, "the model")
    else:
        blocks = BlockMap.find(model)
        names = blocks.parse(config.blocks)
        for group, choice in _choices(blocks, names, config.target_modules):
            inside = [path for name in group for path in blocks.modules[name]]
            targets |= _chosen(model, config, choice, inside, f"blocks {list(group)}")
    _check_separate(model, list(targets), SurgicalLayer)
    for path, module in model.named_modules():
        if path in targets and isinstance(module, SurgicalLayer) and module.keep_base != config.keep_base:
            raise SurgicalError(
                f"keep_base={config.keep_base!r}: {path} is tuned by another adapter already, with "
                f"keep_base={module.keep_base!r}. Adapters that share a module share its base: say the same."
            )
    if config.keep_base == "cpu" and is_deepspeed_zero3_enabled():
        raise SurgicalError(
            "keep_base='cpu' under DeepSpeed's ZeRO-3: the original weights are dealt out over the processes like all "
            "others and cannot be moved one by one. Use 'device', 'none', or DeepSpeed's own offload_param."
        )
    _check_untied(model, targets)
    _check_at_hand(model, list(targets))
    to_save = _still_to_save(model, config, list(targets))
    if config.blocks is not None:
        config.blocks = list(names)
    config.modules_to_save = to_save or None
    config.tuned_modules = {path: None if tuned is None else sorted(tuned) for path, tuned in targets.items()}
    return targets


def _choices(
    blocks: BlockMap, names: tuple[str, ...], target_modules: Targets
) -> list[tuple[tuple[str, ...], Choice]]:
    """The choice for each group of blocks: one for all, or one for each key of a dictionary."""
    if not isinstance(target_modules, dict):
        return [(names, target_modules or "all")]
    groups = [(blocks.parse(key), choice) for key, choice in target_modules.items()]
    said = [name for group, _ in groups for name in group]
    for name in said:
        if said.count(name) > 1 or name not in names:
            reason = "is there twice" if said.count(name) > 1 else f"is not among blocks={list(names)}"
            raise SurgicalError(f"target_modules={target_modules!r}: block {name!r} {reason}. Say each block once.")
    for name in names:
        if name not in said:
            raise SurgicalError(
                f"target_modules={target_modules!r} says nothing about block {name!r}, which is among blocks="
                f"{list(names)}: add {name!r}: 'all', or leave blocks out; the keys are the blocks then."
            )
    return groups


def _chosen(
    model: nn.Module, config: SurgicalConfig, choice: Choice, inside: list[str] | None, where: str
) -> dict[str, set[str] | None]:
    """The largest modules that `choice` means within the paths `inside`, and the parameters of them."""
    if choice == "all" and inside is not None:
        _check_modules(model, inside)
    parts = choice if choice in PARTS else None
    if parts and inside is None:
        raise SurgicalError(
            f"target_modules={choice!r} chooses among the parameters of blocks: say which; blocks='all' is everywhere."
        )
    found = _outermost(model, config, ".*" if parts or (choice == "all" and inside is not None) else choice, inside)
    targets: dict[str, set[str] | None] = dict.fromkeys(found)
    if parts:
        modules = dict(walk(model))
        kept = {path: _parameters_of(modules[path], parts) for path in found}
        targets = {path: names for path, names in kept.items() if names}
    if not targets:
        raise SurgicalError(
            f"target_modules={choice!r} with exclude_modules={config.exclude_modules!r} match no "
            f"module with parameters in {where}. Names inside: {_some_names(model, inside)}."
        )
    return targets


def _parameters_of(module: nn.Module, parts: str) -> set[str]:
    """Names of the biases, or of the parameters of normalisation layers (known by class), in `module`."""
    found = set()
    for path, child in walk(module):
        for name, _ in child.named_parameters(recurse=False):
            if name.endswith("bias") if parts == "all-bias" else "norm" in type(child).__name__.lower():
                found.add(f"{path}.{name}" if path else name)
    return found


def _outermost(model: nn.Module, config: SurgicalConfig, choice: Choice, inside: list[str] | None) -> list[str]:
    """The largest modules asked for, within the paths `inside` if given; in parts where they hold an excluded one."""
    asked = SurgicalConfig(target_modules=choice, exclude_modules=config.exclude_modules, task_type=config.task_type)
    if isinstance(asked.target_modules, str) and asked.target_modules.lower() == "all-linear":
        if any(isinstance(module, SurgicalLayer) for module in model.modules()):
            raise SurgicalError("'all-linear' overlooks what another adapter wraps: name the modules to tune instead.")
        _maybe_include_all_linear_layers(asked, model)
    verdicts = {path: check_target_module_exists(asked, path) for path, _ in walk(model)}
    excluded = [path for path, verdict in verdicts.items() if isinstance(verdict, _ExcludedModule)]
    if config.exclude_modules and not excluded:
        raise SurgicalError(
            f"exclude_modules={config.exclude_modules!r} match no module. Names: {_some_names(model, inside)}."
        )
    found: list[str] = []
    apart: list[str] = []
    for path, module in walk(model):
        if not path or _within(path, found + excluded) or not (verdicts[path] or _within(path, apart)):
            continue
        if (inside is not None and not _within(path, inside)) or not any(True for _ in module.parameters()):
            continue
        if not isinstance(module, _WITHOUT_FORWARD) and not any(_within(other, [path]) for other in excluded):
            found.append(path)
            continue
        apart.append(path)
        for name, _ in module.named_parameters(recurse=False):
            raise SurgicalError(
                f"{path} cannot be tuned in parts: its parameter {name!r} lies in none of its modules. "
                "Tune the whole module around it, or choose others with target_modules."
            )
    return found


def _within(path: str, homes: list[str]) -> bool:
    return any(path == home or path.startswith(home + ".") for home in homes)


def check_adapter_names(model: nn.Module, adapters: dict[str, SurgicalConfig], new: SurgicalConfig) -> None:
    """Refuse what PEFT would only find out by losing weights.

    Raises:
        SurgicalError: the model is wrapped already, or, with several adapters, one has the name of a module.
    """
    name = [name for name, config in adapters.items() if config is new][-1]  # two may share one config object
    layers = [module for module in model.modules() if isinstance(module, SurgicalLayer)]
    if isinstance(model, PeftModel) or any(name in layer.surgical_copies for layer in layers):
        raise SurgicalError(
            f"the model is wrapped already, an adapter {name!r} would mix with the old one: model.unload() the old "
            "one first, load the model afresh, or model.add_adapter(another_name, config)."
        )
    if len(adapters) > 1:
        if any(isinstance(config, SurgicalConfig) and config.keep_base == "none" for config in adapters.values()):
            raise SurgicalError(
                f"adapter {name!r} cannot stand beside {', '.join(n for n in adapters if n != name)}: "
                "keep_base='none' trains in place, which leaves no base for a second one. Use 'device' or 'cpu'."
            )
        parts = {part for path, module in walk(model) for part in [*path.split("."), *module._parameters]}
        for clash in [other for other in adapters if other in parts]:
            raise SurgicalError(
                f"adapter name {clash!r} is also the name of a module or weight: PEFT saves one of several adapters "
                "by leaving out all weights with another's name in their path. Call the adapter something else."
            )


def _check_modules(model: nn.Module, paths: list[str]) -> None:
    modules = {path for path, _ in walk(model)}
    for path in paths:
        if path not in modules:
            raise SurgicalError(
                f"{path} is a parameter of {type(model).__name__} that no module has to itself: it cannot be tuned as "
                "a block. Choose other blocks, or name modules with target_modules."
            )


def _check_separate(model: nn.Module, paths: list[str], kind: type[nn.Module]) -> None:
    """No path may hold, lie in, or (unless `kind` is the wrapper of both) be what another adapter wraps."""
    for other, wrapper in model.named_modules():
        if not isinstance(wrapper, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        for path in paths:
            if path == other and isinstance(wrapper, kind):
                continue
            if _within(path, [other]) or _within(other, [path]):
                raise SurgicalError(
                    f"{path} cannot be tuned: another adapter already tunes {other} with a {type(wrapper).__name__}. "
                    "Adapters share a model only if they choose the same modules, in the same way, or separate ones."
                )


def _check_untied(model: nn.Module, targets: dict[str, set[str] | None]) -> None:
    named = list(model.named_parameters(remove_duplicate=False))
    holders: dict[int, list[str]] = {}
    for name, parameter in named:
        holders.setdefault(id(parameter), []).append(name)
    for path, tuned in targets.items():
        for name, parameter in named:
            shared = [other for other in holders[id(parameter)] if not _within(other, [path])]
            tunes = _within(name, [path]) and (tuned is None or name.removeprefix(path + ".") in tuned)
            if tunes and shared:
                raise SurgicalError(
                    f"{name} is tied to {', '.join(shared)}: a tuned copy of one end would leave the other as it was. "
                    "Choose blocks without it, or load the model with tie_word_embeddings=False if it unties then."
                )


def _check_at_hand(model: nn.Module, paths: list[str]) -> None:
    for each in lent_weights(model):
        if _within(each.name, paths):
            raise SurgicalError(
                f"{each.name} is offloaded by accelerate, so a tuned copy would have no weights of its own: load the "
                "model with a device_map that keeps the chosen blocks on a device (the others may be offloaded), or "
                "wrap it before cpu_offload."
            )


def _still_to_save(model: nn.Module, config: SurgicalConfig, targets: list[str]) -> list[str]:
    """`modules_to_save` without what is tuned anyway (PEFT adds the head of a SEQ_CLS model by itself)."""
    rest: list[str] = []
    for name in dict.fromkeys(config.modules_to_save or []):  # PEFT adds the same ones at every load
        matches = [path for path, _ in walk(model) if path.endswith(name)]  # PEFT's rule: no dot is needed
        others = [path for path in matches if path not in targets]
        overlap = [path for path in others if _within(path, targets) or any(_within(t, [path]) for t in targets)]
        if overlap or 0 < len(others) < len(matches):
            raise SurgicalError(
                f"modules_to_save={name!r} names {(overlap or others)[0]}, but blocks and target_modules already tune "
                "all, part or one of its kind: leave it out of modules_to_save, or give its full path."
            )
        if not matches and config.task_type is None:  # with a task type, PEFT lists every name a head may have
            raise SurgicalError(
                f"modules_to_save={name!r} matches no module of {type(model).__name__}. "
                f"Names: {_some_names(model, None)}."
            )
        _check_separate(model, others, ModulesToSaveWrapper)
        if others or not matches:
            rest.append(name)
    return rest


def _some_names(model: nn.Module, inside: list[str] | None) -> str:
    paths = [p for p, _ in walk(model) if p and (inside is None or any(p.startswith(home + ".") for home in inside))]
    ends = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    return ", ".join([name for name in ends if not name.isdigit()][:30]) or "none"
